// Requests to the server that this page comes from. Paths are relative to the page (/console), so
// that they keep the prefix of a proxy.

const STORED = { admin: "guilomo.admin-key", inference: "guilomo.inference-key" };

/** The keys that were typed: "admin" for adapters, "inference" for answers. This tab's alone. */
export const keys = {
  get: (which) => sessionStorage.getItem(STORED[which]) ?? "",
  set: (which, key) =>
    key ? sessionStorage.setItem(STORED[which], key) : sessionStorage.removeItem(STORED[which]),
};

/** The server's "no", in its words; of status 0 where nobody answers. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get wantsKey() {
    return this.status === 401 || this.status === 403;
  }
}

/**
 * Asks the server with one of the keys.
 * Throws Refused for every status but 2xx, and AbortError once `signal` says so.
 */
export async function ask(which, method, path, body, signal) {
  const headers = {};
  if (keys.get(which)) headers.Authorization = `Bearer ${keys.get(which)}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const sent = body === undefined ? undefined : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: sent, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "no answer from the server");
  }
  if (!response.ok) throw new Refused(response.status, messageOf(await response.text(), response));
  return response;
}

/** A path below /v1/adapters. */
export function adapterPath(name, action = "") {
  return `v1/adapters/${encodeURIComponent(name)}${action && `/${action}`}`;
}

// vLLM's errors are {"error": {"message"}}, its key check says {"error": text}, FastAPI {"detail"}.
function messageOf(text, response) {
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
  const found = body?.error?.message ?? body?.error ?? body?.detail ?? body;
  return typeof found === "string" ? found : JSON.stringify(found);
}

/**
 * The JSON objects of a stream of server-sent events, up to "[DONE]". Of the format only `data`
 * lines of one event each are understood, which is what OpenAI's API sends.
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
