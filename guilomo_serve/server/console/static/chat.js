// One question to several models, an answer of each side by side. Answers are streams of their own:
// nothing else on the page, a swap least of all, touches one that runs.

import { Refused, ask, events } from "./api.js";
import { $, announce, count, element, plural, tell, write } from "./dom.js";

const running = new Set(); // AbortControllers

/** Connects the form. */
export function startChat() {
  const question = $("#question");
  $("#ask").addEventListener("submit", (event) => {
    event.preventDefault();
    askAll(chosenModels(), question.value);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("#ask").requestSubmit();
  });
  $("#stop").addEventListener("click", stopAll);
}

/** Offers models to ask, bases first; those in `picked` are ticked when they are new. */
export function offerModels(bases, adapters, picked) {
  const names = [...bases, ...adapters];
  const known = new Map(boxes().map((box) => [box.value, box.closest("label")]));
  for (const [name, label] of known) if (!names.includes(name)) label.remove();
  names.forEach((name, place) => {
    const label = known.get(name) ?? chip(name, bases.includes(name), picked.includes(name));
    const there = $("#models").children[place];
    if (there !== label) $("#models").insertBefore(label, there ?? null);
  });
}

function chip(name, isBase, checked) {
  const box = element("input", { type: "checkbox", value: name, checked });
  return element("label", { class: isBase ? "base" : null }, box, name);
}

const boxes = () => [...$("#models").querySelectorAll("input")];
const chosenModels = () => boxes().filter((box) => box.checked).map((box) => box.value);

function askAll(models, question) {
  tell($("#ask .error"), models.length ? "" : "Choose at least one model.");
  if (!models.length) return;
  stopAll();
  const settings = {
    messages: [{ role: "user", content: question }],
    max_tokens: $("#max-tokens").valueAsNumber,
    temperature: $("#temperature").valueAsNumber,
  };
  const columns = models.map((model) => newColumn(model));
  $("#answers").replaceChildren(...columns.map(({ view }) => view));
  for (const column of columns) stream(column, { ...settings, model: column.model });
}

function stopAll() {
  for (const controller of running) controller.abort();
}

function newColumn(model) {
  const controller = new AbortController();
  const column = { model, controller, text: document.createTextNode("") };
  column.state = element("span", { class: "state" });
  column.stop = element(
    "button",
    { type: "button", "aria-label": `Stop ${model}`, onclick: () => controller.abort() },
    "Stop",
  );
  column.answer = element("div", { class: "answer", tabindex: "0", role: "group" }, column.text);
  column.answer.setAttribute("aria-label", `Answer of ${model}`);
  column.error = element("p", { class: "error", hidden: true });
  column.figures = element("p", { class: "figures" });
  column.view = element(
    "article",
    { "data-model": model, "aria-label": model },
    element("header", {}, element("h3", {}, model), column.state, column.stop),
    ...[column.answer, column.error, column.figures],
  );
  return column;
}

async function stream(column, body) {
  const { model, controller, text, answer } = column;
  const began = performance.now();
  let first = null;
  let tokens = 0;
  let finish = null;
  const figures = () => {
    const took = performance.now() - began;
    const rate = (tokens - 1) / ((took - first) / 1000);
    write(
      column.figures,
      [
        ...(first === null ? [] : [`first token after ${time(first)}`]),
        ...(tokens ? [plural(tokens, "token")] : []),
        ...(tokens > 8 ? [`${count(Number(rate.toPrecision(2)))} a second`] : []),
      ].join(" · "),
    );
  };
  running.add(controller);
  setState(column, "waiting");
  try {
    // The usage of each event, not of the last alone: what was stopped has a count too.
    const usage = { include_usage: true, continuous_usage_stats: true };
    const request = { ...body, stream: true, stream_options: usage };
    const path = "v1/chat/completions";
    const response = await ask("inference", "POST", path, request, controller.signal);
    for await (const event of events(response)) {
      controller.signal.throwIfAborted(); // what has been received may hold more, even the end
      if (event.error) throw new Refused(event.error.code, event.error.message ?? event.error);
      tokens = event.usage?.completion_tokens ?? tokens;
      if (tokens && first === null) {
        first = performance.now() - began;
        setState(column, "answering");
      }
      const follows = answer.scrollTop + answer.clientHeight >= answer.scrollHeight - 8;
      text.appendData(event.choices?.[0]?.delta?.content ?? "");
      if (follows) answer.scrollTop = answer.scrollHeight;
      finish = event.choices?.[0]?.finish_reason ?? finish;
      figures();
    }
    setState(column, "done");
    if (finish === "length") write(column.state, "done, at its limit of tokens");
    announce(`${model} has answered with ${plural(tokens, "token")}.`);
  } catch (error) {
    if (controller.signal.aborted) {
      setState(column, "stopped");
    } else {
      setState(column, "failed");
      write(column.error, error.message);
      column.error.hidden = false;
      announce(`${model}: ${error.message}`);
    }
  } finally {
    running.delete(controller);
    $("#stop").disabled = running.size === 0;
  }
}

function setState(column, state) {
  column.view.dataset.state = state;
  write(column.state, state);
  column.stop.hidden = !["waiting", "answering"].includes(state);
  $("#stop").disabled = running.size === 0;
}

const time = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
