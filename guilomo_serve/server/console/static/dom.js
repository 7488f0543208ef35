// Elements and figures. Text is only ever text: nothing here or elsewhere in the page reads HTML.

/**
 * An element. Attributes that are false or null are left out, true ones are empty; those that begin
 * with "on" are listeners. Children are elements and texts.
 */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export const $ = (selector) => document.querySelector(selector);

/** Sets a text, without touching what is the same (a selection in it would go). */
export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Shows a message, or hides its place. */
export function tell(place, message) {
  write(place.querySelector("p") ?? place, message);
  place.hidden = !message;
}

/** Says something to who does not see the page. */
export function announce(text) {
  const open = document.querySelector("dialog[open] [role=status]"); // outside of it all is silent
  (open ?? $("#announcer")).textContent = text;
}

export const count = (number) => number.toLocaleString("en");

export function plural(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** A size with three digits, in powers of 1000. */
export function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; size >= 999.5 && unit < units.length - 1; unit++) size /= 1000;
  return `${unit ? size.toPrecision(3) : size} ${units[unit]}`;
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

const KINDS = { guilomo: "LoRA-MoE", lora: "LoRA" };
export const kindOf = (entry) => KINDS[entry.kind] ?? entry.kind;

/** "12 s ago", by the server's clock. */
export function ago(time, now) {
  if (time === null) return "never";
  const seconds = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (seconds < 60) return `${seconds} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}

export const moment = (time) =>
  new Date(time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
