// What can be done with a picture: made again, varied, begun with, animated, saved.

import { blobOf } from "./api.js";
import { $ } from "./dom.js";
import * as form from "./form.js";
import { outputs, isClip, submit } from "./jobs.js";
import { difference } from "./pictures.js";

const MODULUS = 2n ** 64n;
const AWAY = 0.25; // how far the noise of a variation is from the first
const SUFFIX = { jpeg: "jpg" };

/** The request for picture `index` of a job alone: it is the same picture. */
export function part(job, index) {
  const request = { ...job.request, count: 1 };
  if (request.variation) {
    request.variation = { ...request.variation, seed: shifted(request.variation.seed, index) };
  } else {
    request.seed = shifted(request.seed ?? 0, index);
  }
  return request;
}

const shifted = (seed, by) => (BigInt(seed) + BigInt(by)) % MODULUS;

export const seedOf = (job, index) => (job.request.variation ? BigInt(job.request.seed ?? 0) : shifted(job.request.seed ?? 0, index));

/** Ask for the whole job once more, as it was asked for. */
export const retry = (job) => submit({ model: job.model, request: job.request, format: job.format }, isClip(job));

/** Draw one picture once more; `compared` says whether it is the same. */
export async function again(job, index) {
  const order = { model: job.model, request: part(job, index), format: job.format };
  const made = await submit(order, isClip(job));
  if (!isClip(job)) made.like = outputs(job)[index];
  return made;
}

/** Another picture near it. */
export async function vary(job, index) {
  const request = part(job, index);
  const strength = request.variation?.strength ?? AWAY;
  request.variation = { seed: Math.floor(Math.random() * 2 ** 32), strength };
  return submit({ model: job.model, request, format: job.format });
}

/** How a picture that was made again compares, in words. */
export async function compared(job) {
  const { same, size, most, count } = await difference(job.like, outputs(job)[0]);
  if (same) return "Made again: the same to the last pixel.";
  if (size) return "Made again, of another size.";
  return `Made again: ${count.toLocaleString("en")} pixels differ, by at most ${most} of 255.`;
}

export async function beginWith(job, index, element, options) {
  const blob = element?.tagName === "VIDEO" ? await frameOf(element) : await blobOf(outputs(job)[index]);
  await form.beginWith(blob, options);
}

/** Set the form up to have a picture move. */
export async function animate(job, index, element) {
  const model = form.animator();
  if (model !== form.current()) form.choose(model.name);
  form.setKind("clip");
  if (!$("prompt").value) $("prompt").value = job.request.prompt ?? "";
  await beginWith(job, index, element);
}

function frameOf(video) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

export async function save(job, index) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await blobOf(outputs(job)[index]));
  link.download = `${job.id.slice(0, 12)}-${index}.${SUFFIX[job.format] ?? job.format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
