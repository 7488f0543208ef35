// Starts the page, and asks the server every few seconds what there is.

import { Refused, adapterPath, ask } from "./api.js";
import { showList } from "./adapters.js";
import { offerModels, startChat } from "./chat.js";
import { clearDetails, details, showDetails } from "./details.js";
import { openDelete, openKeys, openPut, openRollback, startDialogs } from "./dialogs.js";
import { $, announce, count, plural, tell, write } from "./dom.js";

const REFRESH_MS = 3000;

let adapters = []; // as GET /v1/adapters lists them
let beyond = false; // whether there are more than it listed
let models = []; // as GET /v1/models does
let chosen; // name; null once it is deleted, undefined before anyone could choose
let now = Date.now(); // the server's clock
const refused = new Map(); // "admin" or "inference" -> why the server refuses; it is asked no more
let keysAsked = false;
let timer = null;
let last = Promise.resolve();

/** Asks for everything that can change, after a refresh that runs, and again some seconds later. */
function refresh() {
  last = last.then(refreshOnce);
  return last;
}

async function refreshOnce() {
  try {
    await Promise.all([refreshAdapters(), refreshModels()]);
    setConnection("live", "live");
  } catch (error) {
    setConnection("lost", error.message);
    if (!(error instanceof Refused)) reportError(error);
  }
  const words = [...refused.values()].join(" · ");
  tell($("#refused"), words);
  if (words && !keysAsked) {
    keysAsked = true;
    openKeys(words);
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, REFRESH_MS);
}

async function refreshAdapters() {
  const answer = await guarded("admin", "v1/adapters?limit=1000");
  if (!answer) return;
  now = Date.parse(answer.headers.get("date")) || Date.now();
  const page = await answer.json();
  adapters = page.data;
  beyond = page.has_more;
  if (chosen === undefined) chosen = adapters[0]?.name;
  await show();
}

async function refreshModels() {
  if (models.length && !refused.has("admin")) return; // the rest are in the list of adapters
  const answer = await guarded("inference", "v1/models");
  if (!answer) return;
  models = (await answer.json()).data;
  showModels();
}

/** Asks with a key, unless the server has refused it before; null then. */
async function guarded(which, path) {
  if (refused.has(which)) return null;
  try {
    return await ask(which, "GET", path);
  } catch (error) {
    if (!(error instanceof Refused && error.wantsKey)) throw error;
    const what = which === "admin" ? "" : "answers need the inference key: ";
    refused.set(which, what + error.message);
    return null;
  }
}

async function show() {
  showList(adapters, chosen, choose, now);
  showModels();
  const memory = adapters.filter((entry) => entry.resident).length;
  const running = adapters.reduce((sum, entry) => sum + entry.in_flight, 0);
  const totals = [plural(adapters.length, beyond ? "first adapter" : "adapter"), `${count(memory)} in memory`];
  write($("#totals"), [...totals, `${count(running)} in flight`].join(" · "));
  const entry = adapters.find(({ name }) => name === chosen);
  if (!entry) {
    chosen &&= null;
    return clearDetails();
  }
  try {
    await showDetails(entry);
  } catch (error) {
    if (!(error instanceof Refused && error.status === 404)) throw error; // else deleted meanwhile
  }
}

function showModels() {
  const bases = models.filter((model) => !model.parent).map((model) => model.id);
  const loaded = models.filter((model) => model.parent).map((model) => model.id);
  const names = refused.has("admin") ? loaded : adapters.map((entry) => entry.name);
  offerModels(bases, names, [...bases, chosen ?? names[0]]);
}

async function choose(name, byPointer) {
  chosen = name;
  await show().then(() => announce(`${name} is shown.`), refresh);
  // On a phone it is below the list; who uses a keyboard stays where the focus is.
  const outside = $("#details").getBoundingClientRect().top > innerHeight - 80;
  if (byPointer && outside) $("#details").scrollIntoView();
}

function setConnection(state, words) {
  $("#connection").dataset.state = state;
  write($("#connection"), words);
}

async function pin() {
  const { name } = details();
  const { pinned } = adapters.find((entry) => entry.name === name);
  tell($("#notice"), "");
  try {
    await ask("admin", "POST", adapterPath(name, pinned ? "unpin" : "pin"));
    await refresh();
    announce(pinned ? `${name} is no longer pinned.` : `${name} is pinned: it stays in memory.`);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    tell($("#notice"), error.message);
  }
}

startChat();
startDialogs(
  async (name) => {
    const there = adapters.some((entry) => entry.name === name);
    if (!there) chosen = name; // added
    await refresh();
    if (there && !adapters.some((entry) => entry.name === name)) $("#adapters-heading").focus();
  },
  () => {
    refused.clear();
    keysAsked = false;
    refresh();
  },
);
$("#add").addEventListener("click", () => openPut(null));
$("#swap").addEventListener("click", () => openPut(details()));
$("#rollback").addEventListener("click", () => openRollback(details()));
$("#delete").addEventListener("click", () => openDelete(details()));
$("#pin").addEventListener("click", pin);
$("#open-keys").addEventListener("click", () => openKeys());
$("#refused button").addEventListener("click", () => openKeys($("#refused p").textContent));
$("#notice button").addEventListener("click", () => tell($("#notice"), ""));
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
