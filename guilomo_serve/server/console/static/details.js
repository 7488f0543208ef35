// The chosen adapter: facts, versions, allocation, and how its experts are used.

import { Refused, adapterPath, ask } from "./api.js";
import { $, bytes, count, element, kindOf, moment, percent, plural, write } from "./dom.js";
import { moduleGrid } from "./grid.js";

// An expert is unused below this part of an even share. At 2 of 8 experts a token that is 1 % of
// the tokens, which guilomo_train/health.py calls dead.
const UNUSED = 0.04;

// Of the way from the coolest to the hottest colour: from here on a cell's text is the other one.
const HOT = 0.62;

let shown = null; // what GET /v1/adapters/{name} said of the version that is shown
let load = null; // {grid, summary, measured}: the load of the version that is shown
let calls = 0;
let hasLoadRoute = true;

/** What is shown: the body of GET /v1/adapters/{name}, or null. */
export const details = () => shown;

/** Shows nothing. */
export function clearDetails() {
  calls++;
  shown = load = null;
  write($("#details-heading"), "No adapter chosen");
  $("#details .actions").hidden = $("#details-body").hidden = true;
}

/** Shows an adapter of the list; asks the server for the rest where its version is another one. */
export async function showDetails(entry) {
  const call = ++calls;
  if (shown?.name !== entry.name || !sameVersions(shown, entry)) {
    const detail = await (await ask("admin", "GET", adapterPath(entry.name))).json();
    if (call !== calls) return; // another one was chosen meanwhile
    if (shown?.name !== detail.name || shown.digest !== detail.digest) showAllocation(detail);
    shown = detail;
    forgetLoad();
    showVersions(detail);
  } else {
    Object.assign(shown, entry);
  }
  write($("#details-heading"), entry.name);
  $("#details .actions").hidden = $("#details-body").hidden = false;
  $("#rollback").disabled = entry.previous_version === null;
  write($("#pin"), entry.pinned ? "Unpin" : "Pin");
  $("#details-error").hidden = !entry.error;
  write($("#details-error"), entry.error ?? "");
  showFacts(entry);
  await showLoad(shown);
}

function sameVersions(a, b) {
  return a.version === b.version && a.previous_version === b.previous_version;
}

function showFacts(entry) {
  const per = entry.per_module;
  const facts = {
    Kind: kindOf(entry),
    Task: entry.task ?? "not said",
    Modules: count(entry.modules),
    Experts: `${count(entry.experts)}, ${span(per.experts)} each`,
    "Total rank": `${count(entry.rank)}, ${span(per.rank)} each`,
    Size: bytes(entry.bytes),
    Base: entry.base ?? "not said",
    Source: entry.source,
    Digest: entry.digest,
    Warnings: entry.warnings.join("; ") || "none",
  };
  const list = $("#facts");
  if (!list.children.length) {
    for (const name of Object.keys(facts)) {
      const fact = element("dd", { "data-fact": name });
      list.append(element("div", {}, element("dt", {}, name), fact));
    }
  }
  for (const fact of list.querySelectorAll("dd")) write(fact, facts[fact.dataset.fact]);
}

const span = ({ min, max }) => (min === max ? count(min) : `${count(min)}–${count(max)}`);

function showVersions(detail) {
  const items = detail.versions.map((version, i) =>
    element(
      "li",
      {},
      element("b", {}, `v${version.version}`),
      element("span", { class: "badge" }, i === 0 ? "serving" : "roll-back"),
      element("code", { title: version.digest }, version.digest.slice(0, 12)),
      element("time", { datetime: version.created }, moment(version.created)),
      element("span", { class: "source" }, version.source),
    ),
  );
  $("#versions").replaceChildren(...items);
}

function showAllocation({ allocation }) {
  const totals = new Map(Object.entries(allocation).map(([m, ranks]) => [m, sum(ranks)]));
  const least = Math.min(...totals.values());
  const most = Math.max(...totals.values());
  const fill = (cell, module) => {
    const ranks = allocation[module];
    const heat = most > least ? (totals.get(module) - least) / (most - least) : 0.35;
    cell.classList.add("heat");
    cell.classList.toggle("hot", heat > HOT);
    cell.style.setProperty("--heat", heat.toFixed(3));
    cell.replaceChildren(
      element("b", {}, count(totals.get(module))),
      element("small", {}, `×${ranks.length}`),
    );
    const of = ranks.length === 1 ? "rank" : "ranks";
    const experts = `${plural(ranks.length, "expert")} of ${of} ${ranks.join(", ")}`;
    return `total rank ${totals.get(module)}, ${experts}`;
  };
  const hint = "Total rank × number of experts. Arrow keys or pointer: the ranks of each expert.";
  const { view } = moduleGrid(Object.keys(allocation), "allocation-heading", hint, fill);
  const scale = element(
    "p",
    { class: "legend", "aria-hidden": "true" },
    ...(most > least
      ? [`total rank ${least}`, element("span", { class: "scale" }), String(most)]
      : [`total rank ${most} everywhere`]),
  );
  $("#allocation").replaceChildren(scale, view);
}

function forgetLoad() {
  load = null;
  const words = hasRouters(shown) ? "no load measured yet" : "one expert a module, so no router";
  $("#load").replaceChildren(element("p", { class: "hint" }, words));
}

const hasRouters = (detail) => Object.values(detail.allocation).some((ranks) => ranks.length > 1);

async function showLoad(detail) {
  if (!hasLoadRoute || !hasRouters(detail)) return;
  let measured;
  try {
    measured = await (await ask("admin", "GET", adapterPath(detail.name, "load"))).json();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    // FastAPI's words where there is no such route; otherwise the adapter has just gone.
    if (error.status === 404 && error.message === "Not Found") hasLoadRoute = false;
    return;
  }
  if (detail !== shown || measured.version !== detail.version) return; // of another one by now
  if (!measured.tokens) return forgetLoad();
  if (!load) {
    load = { measured, summary: element("p", { class: "hint" }) };
    const hint =
      "A bar for each expert, the module's busiest at full height. Arrow keys or pointer: shares.";
    load.grid = moduleGrid(Object.keys(detail.allocation), "load-heading", hint, fillLoad);
    $("#load").replaceChildren(load.summary, load.grid.view);
  }
  load.measured = measured;
  load.grid.update();
  const modules = Object.values(measured.modules);
  const unused = sum(modules.map(({ share }) => share.filter(isUnused).length));
  const all = sum(modules.map(({ share }) => share.length));
  const seen = `${plural(measured.tokens, "token")} seen with version ${measured.version}. `;
  const idle = `${count(unused)} of ${plural(all, "expert")} unused, hatched.`;
  write(load.summary, seen + (unused ? idle : "All experts are in use."));
}

const isUnused = (share, _, all) => all.length > 1 && share * all.length < UNUSED;

function fillLoad(cell, module) {
  const of = load.measured.modules[module];
  cell.classList.add("load");
  if (!of?.tokens) {
    cell.replaceChildren("–");
    return shown.allocation[module].length > 1 ? "no tokens yet" : "one expert, so no router";
  }
  const most = Math.max(...of.share);
  const bars = of.share.map((share, i) => {
    const unused = isUnused(share, i, of.share);
    const bar = element("i", { class: unused && "unused" });
    bar.style.setProperty("--share", unused ? 1 : share / most);
    return bar;
  });
  cell.replaceChildren(element("div", { class: "bars" }, ...bars));
  const words = of.share.map(
    (share, i) => `expert ${i} ${percent(share)}${isUnused(share, i, of.share) ? " (unused)" : ""}`,
  );
  return `${words.join(", ")}; entropy ${of.entropy.toFixed(2)}, ${plural(of.tokens, "token")}`;
}

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
