// Pictures and clips as addresses that an element can show: fetched with the key, kept while the page is open.

import { address, blobOf, key } from "./api.js";

const known = new Map();

/** An address for `src`. Without keys it is the server's own, so that the browser loads as it likes. */
export function source(path) {
  if (!key()) return Promise.resolve(address(path));
  if (!known.has(path)) {
    const found = blobOf(path).then((blob) => URL.createObjectURL(blob));
    found.catch(() => known.delete(path));
    known.set(path, found);
  }
  return known.get(path);
}

/** Have an element show a picture or a clip; it is marked while it loads, and when it cannot. */
export async function show(element, path) {
  element.classList.add("loading");
  const ready = element.tagName === "VIDEO" ? "loadeddata" : "load";
  element.addEventListener(ready, () => element.classList.remove("loading"), { once: true });
  element.addEventListener("error", () => lost(element), { once: true });
  try {
    element.src = await source(path);
  } catch {
    lost(element);
  }
}

function lost(element) {
  element.classList.replace("loading", "lost");
  element.setAttribute("alt", "It is not kept any more");
}

/** How two pictures differ: {same, size, most, count}; most of 255, count of pixels. */
export async function difference(one, two) {
  const [a, b] = await Promise.all([one, two].map(async (path) => pixels(await blobOf(path))));
  if (a.width !== b.width || a.height !== b.height) return { same: false, size: true, most: 255, count: 0 };
  let most = 0;
  let count = 0;
  for (let at = 0; at < a.data.length; at += 4) {
    let apart = 0;
    for (let c = 0; c < 3; c++) apart = Math.max(apart, Math.abs(a.data[at + c] - b.data[at + c]));
    most = Math.max(most, apart);
    count += apart > 0;
  }
  return { same: most === 0, size: false, most, count };
}

async function pixels(blob) {
  const bitmap = await createImageBitmap(blob);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}
