// Talking to the server: the key, requests, errors, files, and server-sent events with the key in their header.

import { parse, write } from "./json.js";

const KEPT = "sfumato-key";
export const UNREACHABLE = "unreachable";

/** What the server says no with. code: stable; param: which field; after: seconds until it may be tried again. */
export class Refusal extends Error {
  constructor(status, error, after = null) {
    super(error.message);
    Object.assign(this, { status, code: error.code, param: error.param ?? null, after });
  }
}

export const key = () => sessionStorage.getItem(KEPT) ?? localStorage.getItem(KEPT);

export function setKey(value, keep = false) {
  sessionStorage.removeItem(KEPT);
  localStorage.removeItem(KEPT);
  if (value) (keep ? localStorage : sessionStorage).setItem(KEPT, value);
}

/** An address of the server, wherever it lies behind a proxy. */
export const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI).href;

/** The response, if the server says yes; else a `Refusal`. */
export async function ask(path, { method = "GET", body, type, headers = {}, signal } = {}) {
  const held = key();
  const options = { method, signal, cache: "no-cache", headers: { ...headers } };
  if (held) options.headers.authorization = `Bearer ${held}`;
  if (body !== undefined) {
    options.headers["content-type"] = type ?? "application/json";
    options.body = type ? body : write(body);
  }
  let answer;
  try {
    answer = await fetch(address(path), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { code: UNREACHABLE, message: "The server does not answer." });
  }
  if (answer.ok) return answer;
  const refused = await refusal(answer);
  if (refused.code === "invalid_api_key") document.dispatchEvent(new CustomEvent("key-wanted"));
  throw refused;
}

async function refusal(answer) {
  const after = Number(answer.headers.get("retry-after")) || null;
  try {
    return new Refusal(answer.status, (await answer.json()).error, after);
  } catch {
    return new Refusal(answer.status, { code: "internal", message: `The server answered ${answer.status}.` }, after);
  }
}

export async function get(path, options) {
  return parse(await (await ask(path, options)).text());
}

export async function post(path, body, options = {}) {
  return parse(await (await ask(path, { method: "POST", body, ...options })).text());
}

export async function blobOf(path) {
  return (await ask(path, { })).blob();
}

/** Send a picture; its id may stand in requests. */
export async function upload(blob) {
  const type = blob.type || "application/octet-stream";
  const options = { method: "POST", body: blob, type };
  return parse(await (await ask("v1/files", options)).text());
}

/** A word nobody else has, for `Idempotency-Key`; pages without TLS have no crypto.randomUUID. */
export function unique() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Server-sent events as [name, data], until the server ends them. */
export async function* events(path, signal) {
  const answer = await ask(path, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (buffer + value).split("\n\n");
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n");
        const field = (name) => lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
        if (field("data") !== undefined) yield [field("event") ?? "message", parse(field("data"))];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
