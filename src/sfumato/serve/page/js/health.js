// Whether the server is there and can draw.

import { address } from "./api.js";
import { $, wait } from "./dom.js";

const WORDS = { ready: "Ready", starting: "Loading the model …", draining: "The server is stopping", away: "The server does not answer" };

/** Look for as long as the page is open. back(): called when the server can draw again after it could not. */
export async function begin(back) {
  let before = null;
  for (;;) {
    const state = await look();
    if (state !== before) {
      $("health").className = `health ${state}`;
      $("health").textContent = WORDS[state];
      if (before !== null && state === "ready") back();
      before = state;
    }
    await wait(state === "ready" ? 15_000 : 2_000);
  }
}

async function look() {
  try {
    const { status } = await (await fetch(address("readyz"), { cache: "no-store" })).json();
    return status in WORDS ? status : "away";
  } catch {
    return "away";
  }
}
