// Layers x kinds of module, as a table of which one cell is in the tab order: arrows, Home and End
// move between cells, and a line below says in words what the cell under focus or pointer shows.

import { element, write } from "./dom.js";

// The order in which a layer of a Llama computes; other kinds follow as they come.
const ORDER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(" ");

/**
 * A grid of modules.
 * `label` is the id of its heading; `fill(cell, module)` puts a module's figures into its cell and
 * returns them in words. The grid's `update()` fills all cells again.
 */
export function moduleGrid(modules, label, hint, fill) {
  const { layers, kinds, places } = arranged(modules);
  const said = element("p", { class: "readout" }, hint);
  const words = new Map(); // cell -> what it shows, in words
  const cells = []; // [layer][kind]
  let current = null;

  const say = (cell) => {
    if (words.has(cell)) write(said, words.get(cell));
  };
  const body = element("tbody");
  for (const layer of layers) {
    const row = element("tr", {}, element("th", { scope: "row" }, layer));
    cells.push(
      kinds.map((kind) => {
        const cell = element("td", { tabindex: "-1", onfocus: () => move(cell) });
        cell.addEventListener("pointerenter", () => say(cell));
        const module = places.get(`${layer} ${kind}`);
        if (module) {
          cell.dataset.module = module;
        } else {
          cell.append("–");
          cell.setAttribute("aria-label", "no adapter");
          words.set(cell, `${kind} of layer ${layer}: no adapter`);
        }
        row.append(cell);
        return cell;
      }),
    );
    body.append(row);
  }

  function move(cell) {
    current?.setAttribute("tabindex", "-1");
    current = cell;
    current.setAttribute("tabindex", "0");
    say(cell);
  }

  function onkeydown(event) {
    const row = cells.findIndex((of) => of.includes(current));
    const column = cells[row].indexOf(current);
    const to = {
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      Home: [event.ctrlKey ? 0 : row, 0],
      End: [event.ctrlKey ? cells.length - 1 : row, kinds.length - 1],
    }[event.key];
    if (!to || event.altKey || event.metaKey) return;
    event.preventDefault();
    cells[to[0]]?.[to[1]]?.focus();
  }

  function update() {
    for (const cell of cells.flat()) {
      const module = cell.dataset.module;
      if (!module) continue;
      words.set(cell, `${module}: ${fill(cell, module)}`);
      cell.setAttribute("aria-label", words.get(cell).slice(module.length + 2));
      if (cell === document.activeElement) say(cell);
    }
  }

  update();
  if (cells.length) {
    current = cells[0][0];
    current.setAttribute("tabindex", "0");
  }
  const head = element("tr", {}, element("td", { class: "corner" }), ...kinds.map(columnHead));
  const table = element(
    "table",
    { class: "grid", role: "grid", "aria-labelledby": label, onkeydown },
    ...[element("thead", {}, head), body],
  );
  const view = element("div", { class: "scroll" }, table);
  return { view: element("div", {}, view, said), update };
}

/** Layers, kinds and the module at each "layer kind", of names like model.layers.3.mlp.up_proj. */
function arranged(modules) {
  const parts = modules.map((module) => {
    const found = /\.(\d+)\.(.+)$/.exec(module);
    return found ? [found[1], found[2], found[2].split(".").pop()] : ["–", module, module];
  });
  // The last part alone, unless two modules of a layer share it.
  const short = new Set(parts.map(([layer, , last]) => `${layer} ${last}`)).size === parts.length;
  const places = new Map();
  const kinds = new Set();
  parts.forEach(([layer, whole, last], i) => {
    kinds.add(short ? last : whole);
    places.set(`${layer} ${short ? last : whole}`, modules[i]);
  });
  const layers = [...new Set(parts.map(([layer]) => layer))].sort((a, b) => a - b);
  const rank = (kind) => (ORDER.includes(kind) ? ORDER.indexOf(kind) : ORDER.length);
  return { layers, kinds: [...kinds].sort((a, b) => rank(a) - rank(b)), places };
}

// What all kinds end in is there, but not seen: seven columns fit a phone.
function columnHead(kind) {
  const [short, rest] = kind.endsWith("_proj") ? [kind.slice(0, -5), "_proj"] : [kind, ""];
  const head = element("th", { scope: "col", title: kind }, short);
  if (rest) head.append(element("span", { class: "visually-hidden" }, rest));
  return head;
}
