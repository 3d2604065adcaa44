// The jobs of this key: loaded, submitted, followed until they end. Views listen for what changes.
//
// A browser opens six connections to a server, so only the first few open jobs are followed by their events; how far
// the others are is asked now and then.

import { Refusal, UNREACHABLE, events, get, post, unique } from "./api.js";
import { wait } from "./dom.js";

const STREAMS = 2;
const ASKED = 2500; // milliseconds
const PAGE = 48;
const PAUSES = [500, 1500]; // milliseconds before a submission that got no answer is sent once more
const OPEN = new Set(["queued", "running"]);

export const jobs = new Map();
const listeners = new Set();
const followed = new Set();
let more = false;

/** Hear of changes: listener(job, what), what being state, progress or preview; (null, "all") after a load. */
export const listen = (listener) => listeners.add(listener);
const tell = (job, what) => listeners.forEach((listener) => listener(job, what));

export const isOpen = (job) => OPEN.has(job.state);
export const isClip = (job) => job.object === "video";
/** Where the pictures, or clips, of a job lie. */
export const outputs = (job) => (job.clips?.length ? job.clips : job.pictures);
/** The same, small. */
export const thumbs = (job) => job.thumbs;
/** What a job is called. */
export const title = (job) => job.request.prompt || (job.request.image ? `A ${isClip(job) ? "clip" : "picture"} from a picture` : "Without a prompt");
/** As the server lists them: of two that came at once, the greater id first. */
export const newestFirst = () => [...jobs.values()].sort((a, b) => b.created - a.created || (a.id < b.id ? 1 : -1));
export const open = () => newestFirst().filter(isOpen).reverse();
export const hasMore = () => more;

const home = (job) => `v1/${isClip(job) ? "videos" : "jobs"}/${job.id}`;

function keep(news) {
  const job = jobs.get(news.id) ?? {};
  const before = job.state;
  Object.assign(job, news);
  jobs.set(job.id, job);
  if (before !== job.state) tell(job, "state");
  else if (isOpen(job)) tell(job, "progress");
  return job;
}

/** Load the latest jobs, or those before the oldest that is known. */
export async function load(older = false) {
  const oldest = newestFirst().at(-1);
  const before = older && oldest ? `&before=${oldest.id}` : "";
  const { data, has_more: rest } = await get(`v1/jobs?limit=${PAGE}${before}`);
  if (older || !jobs.size) more = rest;
  data.forEach((job) => jobs.set(job.id, Object.assign(jobs.get(job.id) ?? {}, job)));
  tell(null, "all");
  follow();
}

/** Have something drawn. order: {model, request, format}; clip: whether it moves. Returns the job. */
export async function submit(order, clip = false) {
  const headers = { "idempotency-key": unique() };
  for (const pause of [...PAUSES, null]) {
    try {
      const job = keep(await post(clip ? "v1/videos" : "v1/jobs", { ...order, previews: 8 }, { headers }));
      follow();
      return job;
    } catch (error) {
      if (error.code !== UNREACHABLE || pause === null) throw error;
      await wait(pause); // with the same key it is one job, whether or not the server heard of it
    }
  }
}

export async function cancel(job) {
  keep(await post(`${home(job)}/cancel`));
}

export const receipt = (job) => get(`${home(job)}/receipt`);

function follow() {
  for (const job of open()) {
    if (followed.size >= STREAMS) break;
    if (followed.has(job.id)) continue;
    followed.add(job.id);
    watch(job).finally(() => {
      followed.delete(job.id);
      follow();
    });
  }
  if (open().length) poll();
}

/** Until the job has ended, whatever becomes of the connection. */
async function watch(job) {
  while (isOpen(job)) {
    try {
      for await (const [name, data] of events(`${home(job)}/events`)) hear(job, name, data);
      if (isOpen(job)) keep(await get(home(job)));
    } catch (error) {
      if (error instanceof Refusal && [401, 403, 404].includes(error.status)) {
        keep({ ...job, state: "failed", error: { code: error.code, message: error.message } });
        return;
      }
    }
    if (isOpen(job)) await wait(1000);
  }
}

function hear(job, name, data) {
  if (name === "state") keep(data);
  else if (name === "progress") {
    Object.assign(job, data);
    tell(job, "progress");
  } else if (name === "preview") {
    job.preview = `data:${data.media_type};base64,${data.b64}`;
    tell(job, "preview");
  }
}

let polling = false;

async function poll() {
  if (polling) return;
  polling = true;
  while (open().length) {
    await wait(ASKED);
    if (open().length <= followed.size && open().every((job) => job.state === "running")) continue;
    try {
      const { data } = await get(`v1/jobs?limit=${PAGE}`);
      data.forEach(keep);
      follow();
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
    }
  }
  polling = false;
}
