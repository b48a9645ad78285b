// Requests to the API of this server: key, errors as it says them, waiting where it asks for it.

const KEY = "vfengine-api-key";
const LONGEST_WAIT = 30_000; // ms between two tries while the server cannot be reached

let key = sessionStorage.getItem(KEY) ?? "";
let askForKey = null; // (message) => Promise<string>, set by the page
let asking = null; // one question at a time, however many requests wait for it

/** What the API answered instead of what was asked for. */
export class ApiError extends Error {
  constructor(status, body, headers) {
    const error = body?.error ?? {};
    super(error.message || `The server answered ${status}.`);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
    this.retryAfter = retryAfter(headers);
  }
}

/** No answer at all: the server is down, or the network is. */
export class Unreachable extends Error {}

export const hasKey = () => key !== "";

export function onKeyWanted(ask) {
  askForKey = ask;
}

/** Asks for another key, whatever the present one is. */
export function changeKey(message) {
  asking ??= askForKey(message)
    .then((given) => {
      key = given;
      sessionStorage.setItem(KEY, given);
    })
    .finally(() => (asking = null));
  return asking;
}

/** Seeds have up to 64 bits, numbers here 53: those that are longer stay text. */
const parse = (text) =>
  JSON.parse(text.replace(/"((?:base_|residual_)?seed)":(\s*)(\d{16,})/g, '"$1":$2"$3"'));

/** The answer to a request; paths are relative to this page. Throws ApiError or Unreachable. */
async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    const used = key;
    let response;
    try {
      response = await fetch(path, {
        method,
        body,
        signal,
        headers: { ...headers, ...(used && { Authorization: `Bearer ${used}` }) },
      });
    } catch (error) {
      if (signal?.aborted) throw error;
      throw new Unreachable("The server cannot be reached.");
    }
    if (response.ok) return response;
    const answer = await response.text().then(parse).catch(() => null);
    const error = new ApiError(response.status, answer, response.headers);
    if (error.status !== 401 || !askForKey) throw error;
    // another request may have got a new key while this one was under way
    if (used === key) await changeKey(used ? error.message : "");
  }
}

/** The JSON of an answer, and after how many ms to ask again (null: not said). */
export async function ask(path, options) {
  const response = await send(path, options);
  const text = await response.text().catch(() => {
    throw new Unreachable("The answer of the server was cut short.");
  });
  const after = Number(response.headers.get("openai-poll-after-ms"));
  return { value: text ? parse(text) : null, pollAfter: after > 0 ? after : null };
}

export async function askForBlob(path) {
  const response = await send(path);
  return response.blob().catch(() => {
    throw new Unreachable("The answer of the server was cut short.");
  });
}

/**
 * As `ask`, for a request that makes a clip: tries again while the queue is full or the server
 * cannot be reached, under one Idempotency-Key, so that nothing is done twice.
 *
 * waiting: called with a message and the ms until the next try, and with null once that is over
 * signal:  gives up
 */
export async function insist(path, { body, json, signal, waiting = () => {} }) {
  const headers = { "Idempotency-Key": randomId() };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  const content = json === undefined ? body : JSON.stringify(json);
  for (let tries = 0; ; tries += 1) {
    try {
      return await ask(path, { method: "POST", body: content, headers, signal });
    } catch (error) {
      const full = error instanceof ApiError && error.status === 429;
      if (!full && !(error instanceof Unreachable)) throw error;
      const pause = full ? (error.retryAfter ?? backoff(tries)) : backoff(tries);
      waiting(error.message, pause);
      await sleep(pause, signal);
      waiting(null, 0);
    }
  }
}

/** ms before try number `tries`, counted from 0. */
export function backoff(tries) {
  const wait = Math.min(LONGEST_WAIT, 1000 * 2 ** tries);
  return wait * (0.8 + 0.4 * Math.random());
}

export function sleep(ms, signal) {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) return reject(signal.reason);
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

function retryAfter(headers) {
  const ms = Number(headers.get("retry-after-ms"));
  const seconds = Number(headers.get("retry-after"));
  return ms > 0 ? ms : seconds > 0 ? seconds * 1000 : null;
}

function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// -- pictures and clips ---------------------------------------------------------------------------

const CLIPS_KEPT = 8;
const media = new Map(); // "id/variant" -> Promise of { blob, url }

/** The file of a clip, fetched once: { blob, url }. variant: "video" or "thumbnail". */
export function file(id, variant) {
  const name = `${id}/${variant}`;
  if (!media.has(name)) {
    const wanted = askForBlob(`v1/videos/${id}/content?variant=${variant}`).then((blob) => ({
      blob,
      url: URL.createObjectURL(blob),
    }));
    media.set(name, wanted);
    wanted.catch(() => media.delete(name));
    if (variant === "video") {
      const clips = [...media.keys()].filter((key) => key.endsWith("/video"));
      clips.slice(0, -CLIPS_KEPT).forEach(drop);
    }
  }
  return media.get(name);
}

/** Frees the files of a clip that is gone. */
export function forget(id) {
  drop(`${id}/video`);
  drop(`${id}/thumbnail`);
}

function drop(name) {
  media.get(name)?.then(({ url }) => URL.revokeObjectURL(url)).catch(() => {});
  media.delete(name);
}
