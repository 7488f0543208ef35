// What is asked before something changes: each dialog says what will happen, does it, and keeps
// the server's answer where it refuses. And the keys.

import { Refused, adapterPath, ask, keys } from "./api.js";
import { $, announce, bytes, count, element, kindOf, plural, tell, write } from "./dom.js";

const change = $("#change");
const form = change.querySelector("form");
const confirm = change.querySelector(".confirm");
const check = change.querySelector(".check");
const problem = change.querySelector(".error");

// What the open dialog's buttons do; a new one at each opening, so that an answer that comes after
// its dialog was closed does nothing to the next.
let asked = { act: null, look: null, busy: false };
let changed = null; // called with the name once something has changed

/** Connects the dialogs. `whenChanged(name)` is called after a change, `whenKeys()` after keys. */
export function startDialogs(whenChanged, whenKeys) {
  changed = whenChanged;
  confirm.addEventListener("click", () => run(confirm, asked.act));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    run(check, asked.look);
  });
  for (const dialog of [change, $("#keys")]) {
    dialog.querySelector(".cancel").addEventListener("click", () => dialog.close());
  }
  $("#keys").addEventListener("close", () => $("#keys form").reset()); // they are kept elsewhere
  $("#keys form").addEventListener("submit", (event) => {
    event.preventDefault();
    for (const which of ["admin", "inference"]) keys.set(which, $(`#${which}-key`).value);
    $("#keys").close();
    whenKeys();
  });
}

/** Asks for the keys; `refusal` is what the server said without them, if it did. */
export function openKeys(refusal = "") {
  if ($("#keys").open) return;
  for (const which of ["admin", "inference"]) $(`#${which}-key`).value = keys.get(which);
  tell($("#keys .error"), refusal);
  $("#keys").showModal();
}

/** Adds an adapter, or swaps the one that `detail` describes. */
export function openPut(detail) {
  const name = element("input", { id: "change-name", required: true, maxlength: 128 });
  const source = element("input", { id: "change-source", required: true, maxlength: 4096 });
  for (const input of [name, source]) {
    Object.assign(input, { autocomplete: "off", spellcheck: false });
    input.addEventListener("input", uncheck);
  }
  source.value = detail?.source ?? "";
  const hint = "Where the server is to take it from, as the server sees it.";
  const labelled = (label, input) => [element("label", { for: input.id }, label), input];
  open(detail ? `Swap ${detail.name}` : "Add an adapter", detail ? "Swap" : "Add", "", [
    ...(detail ? [] : labelled("Name", name)),
    ...labelled("Source", source),
    element("p", { class: "hint" }, hint),
  ]);
  const uncheckedNote = "Check reads and checks the adapter and changes nothing.";
  $("#change-body").replaceChildren(element("p", {}, uncheckedNote));
  confirm.disabled = true;
  check.hidden = false;
  const mine = asked;
  const targetOf = () => detail?.name ?? name.value;
  source.select();

  function uncheck() {
    confirm.disabled = true;
    if (mine.act) $("#change-body").replaceChildren(element("p", {}, uncheckedNote));
    mine.act = null;
  }

  mine.look = async () => {
    uncheck();
    const target = targetOf();
    const body = { source: source.value, dry_run: true };
    const next = await (await ask("admin", "PUT", adapterPath(target), body)).json();
    const now = await currentOf(target);
    if (asked !== mine || source.value !== body.source || targetOf() !== target) return;
    const steps = now
      ? [
          ...(now.digest === next.digest
            ? ["The files are the same as those served: answers stay as they are."]
            : []),
          `New requests for ${target} get the checked files as a new version, once it is loaded.`,
          ...finishing(now),
          kept(now),
        ]
      : [`${target} is served once its weights are loaded.`];
    $("#change-body").replaceChildren(comparison(now, next, "new"), list(steps));
    write(confirm, now ? "Swap" : "Add");
    confirm.disabled = false;
    announce(`Checked. ${steps.join(" ")}`);
    // With the digest: what was checked is what gets served, or nothing.
    mine.act = () => put(target, { source: body.source, digest: next.digest });
  };
}

async function put(name, body) {
  const served = await (await ask("admin", "PUT", adapterPath(name), body)).json();
  return [name, `${name} is now version ${served.version}.`];
}

/** Serves the previous version of an adapter again. */
export function openRollback(detail) {
  const [now, previous] = detail.versions;
  open(`Roll back ${detail.name}`, "Roll back", "");
  const steps = [
    `New requests for ${detail.name} get what version ${previous.version} was, as a new version.`,
    ...finishing(detail),
    `Version ${now.version} is kept to return to.`,
  ];
  const compared = comparison(now, previous, `v${previous.version} again`);
  $("#change-body").replaceChildren(compared, list(steps));
  asked.act = async () => {
    const served = await (await ask("admin", "POST", adapterPath(detail.name, "rollback"))).json();
    return [detail.name, `${detail.name} is rolled back, as version ${served.version}.`];
  };
}

/** Takes an adapter away. */
export function openDelete(detail) {
  open(`Delete ${detail.name}`, "Delete", "danger");
  const versions = detail.versions.map((version) => version.version).join(" and ");
  const copies = detail.versions.length > 1 ? "copies of versions" : "copy of version";
  const steps = [
    `${detail.name} is no longer served.`,
    `If an adapter root has a folder named ${detail.name}, that is served when it is asked for.`,
    ...finishing(detail),
    `The server deletes its ${copies} ${versions}, except what other names use.`,
    "There is no way back but to add the adapter again.",
    `The source, ${detail.source}, stays as it is.`,
  ];
  $("#change-body").replaceChildren(list(steps));
  asked.act = async () => {
    await ask("admin", "DELETE", adapterPath(detail.name));
    return [detail.name, `${detail.name} is deleted.`];
  };
}

function finishing(entry) {
  const running = entry.in_flight ? `, ${plural(entry.in_flight, "request")} now,` : "";
  return [`What is being answered${running} finishes with version ${entry.version}.`];
}

function kept(now) {
  const gone = now.previous_version ? ` Version ${now.previous_version} no longer is.` : "";
  return `Version ${now.version} is kept to roll back to.${gone}`;
}

async function currentOf(name) {
  try {
    return await (await ask("admin", "GET", adapterPath(name))).json();
  } catch (error) {
    if (error instanceof Refused && error.status === 404) return null;
    throw error;
  }
}

function open(title, action, kind, fields = []) {
  asked = { act: null, look: null, busy: false };
  write($("#change-title"), title);
  $("#change-fields").replaceChildren(...fields);
  tell(problem, "");
  announce("");
  write(confirm, action);
  confirm.className = `confirm ${kind || "primary"}`;
  confirm.disabled = false;
  check.hidden = true;
  change.showModal();
  if (!fields.length) change.querySelector(".cancel").focus();
}

/** Runs what a button does, once, and shows the server's "no" in the dialog. */
async function run(button, what) {
  const mine = asked;
  if (!what || mine.busy) return;
  mine.busy = true;
  button.setAttribute("aria-busy", "true");
  tell(problem, "");
  try {
    const done = await what();
    if (!done) return; // checked
    const [name, message] = done;
    if (asked === mine) change.close();
    await changed(name);
    announce(message);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    // One may have closed the dialog meanwhile.
    tell(change.open && asked === mine ? problem : $("#notice"), error.message);
  } finally {
    mine.busy = false;
    button.removeAttribute("aria-busy");
  }
}

function list(steps) {
  return element("ul", { class: "steps" }, ...steps.map((step) => element("li", {}, step)));
}

const COMPARED = [
  ["Kind", kindOf],
  ["Base", (of) => of.base ?? "not said"],
  ["Modules", (of) => count(of.modules)],
  ["Experts", (of) => count(of.experts)],
  ["Total rank", (of) => count(of.rank)],
  ["Size", (of) => bytes(of.bytes)],
  ["Digest", (of) => of.digest.slice(0, 16)],
  ["Source", (of) => of.source],
  ["Warnings", (of) => of.warnings.join("; ") || "none"],
];

/** Two versions side by side; `now` may be null. What differs is marked, in words too. */
function comparison(now, next, title) {
  const titles = ["", now ? `now: v${now.version}` : "now", title];
  const head = titles.map((text) => element("th", { scope: "col" }, text));
  const rows = COMPARED.map(([label, figure]) => {
    const [before, after] = [now ? figure(now) : "–", figure(next)];
    const differs = now !== null && before !== after;
    const mark = differs ? element("span", { class: "visually-hidden" }, " (differs)") : null;
    return element(
      "tr",
      { class: differs && "differs" },
      element("th", { scope: "row" }, label),
      ...[element("td", {}, before), element("td", {}, after, mark)],
    );
  });
  return element(
    "table",
    { class: "comparison" },
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows),
  );
}
