// The list of adapters. Rows stay the same elements while figures change: focus and selection with
// them. Roles are said where CSS makes cards of the rows, by which some browsers forget the table.

import { $, ago, bytes, count, element, kindOf, write } from "./dom.js";

const COLUMNS = [
  ["version", "number", "Version"],
  ["kind", "", "Kind"],
  ["experts", "number", "Experts"],
  ["rank", "number", "Total rank"],
  ["bytes", "number", "Size"],
  ["weights", "", "Weights"],
  ["in-flight", "number", "In flight"],
  ["last-used", "", "Last used"],
];

const rows = new Map(); // name -> {row, cells}

/**
 * Shows the adapters as the server lists them.
 * `chosen` is a name or null; `choose(name, byPointer)` is called when a row is; `now` is the
 * server's time.
 */
export function showList(entries, chosen, choose, now) {
  const body = $("#adapters tbody");
  for (const [name, { row }] of rows) {
    if (entries.some((entry) => entry.name === name)) continue;
    row.remove();
    rows.delete(name);
  }
  entries.forEach((entry, place) => {
    if (!rows.has(entry.name)) rows.set(entry.name, newRow(entry.name, choose));
    const { row, cells } = rows.get(entry.name);
    if (body.children[place] !== row) body.insertBefore(row, body.children[place] ?? null);
    fill(row, cells, entry, entry.name === chosen, now);
  });
  const empty = $("#adapters .empty");
  empty.hidden = entries.length > 0;
  write(empty, "No adapters yet. Those in the server's adapter roots appear when first used.");
}

function newRow(name, choose) {
  const button = element("button", { type: "button", class: "choose" }, name);
  const cells = { button, badge: element("span", { class: "badge" }, "pinned") };
  cells.error = element("span", { class: "error" });
  const inside = [button, " ", cells.badge, cells.error];
  const head = element("th", { scope: "row", role: "rowheader" }, ...inside);
  const onclick = (event) => choose(name, event.detail > 0);
  const row = element("tr", { role: "row", "data-name": name, onclick }, head);
  for (const [key, kind, label] of COLUMNS) {
    cells[key] = element("td", { role: "cell", class: `${key} ${kind}`, "data-label": label });
    row.append(cells[key]);
  }
  return { row, cells };
}

function fill(row, cells, entry, chosen, now) {
  row.classList.toggle("chosen", chosen);
  cells.button.setAttribute("aria-pressed", chosen);
  cells.badge.hidden = !entry.pinned;
  cells.error.hidden = !entry.error;
  write(cells.error, entry.error ?? "");
  write(cells.version, count(entry.version));
  write(cells.kind, kindOf(entry));
  write(cells.experts, count(entry.experts));
  write(cells.rank, count(entry.rank));
  write(cells.bytes, bytes(entry.bytes));
  cells.bytes.title = `${count(entry.bytes)} bytes`;
  write(cells.weights, weightsOf(entry));
  cells.weights.dataset.state = entry.error ? "failed" : entry.resident ? "resident" : "evicted";
  write(cells["in-flight"], count(entry.in_flight));
  cells["in-flight"].classList.toggle("busy", entry.in_flight > 0);
  write(cells["last-used"], ago(entry.last_used, now));
}

/** Where an adapter's weights are, in words. */
export function weightsOf(entry) {
  if (entry.error) return "not served";
  return entry.resident ? "in memory" : "on disk";
}
