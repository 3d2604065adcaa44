// Icons as strokes on a grid of 24.

const SHAPES = {
  again: "M4 12a8 8 0 1 1 2.6 5.9 M4 18v-5h5",
  auto: "M12 3a9 9 0 1 0 0 18z M12 3a9 9 0 0 1 0 18",
  brush: "M20 4 10.5 13.5 M14 4.8l5.2 5.2 M9 13c-2.6 0-3.2 1.8-3.4 3.4C5.4 18 4.6 19 3 19.5c3.6 1.4 8.6.8 8.6-3.6",
  clip: "M4 6h16v12H4z M10 9.5v5l4.5-2.5z",
  close: "M6 6l12 12 M18 6 6 18",
  dark: "M20 14.5A8.5 8.5 0 1 1 9.5 4 7 7 0 0 0 20 14.5z",
  down: "M12 4v11 M7 10.5l5 5 5-5 M5 20h14",
  key: "M14.5 9.5a4.5 4.5 0 1 1-4.2-3 M12.5 10.5 20 18v2.5h-3V18h-2.5v-2.5",
  left: "M15 5l-7 7 7 7",
  light: "M12 7.5a4.5 4.5 0 1 0 0 9 4.5 4.5 0 0 0 0-9z M12 2.5v2 M12 19.5v2 M2.5 12h2 M19.5 12h2 M5.3 5.3l1.4 1.4 M17.3 17.3l1.4 1.4 M18.7 5.3l-1.4 1.4 M6.7 17.3l-1.4 1.4",
  picture: "M4 5h16v14H4z M4 16l4.5-4.5 4 4 2.5-2.5 5 5 M15.5 8.8h.01",
  plus: "M12 5v14 M5 12h14",
  right: "M9 5l7 7-7 7",
  sliders: "M4 7h9 M17 7h3 M15 5v4 M4 12h3 M11 12h9 M9 10v4 M4 17h9 M17 17h3 M15 15v4",
  start: "M5 4v16 M9 12h11 M15 7l5 5-5 5",
  vary: "M4 7h3.5c4.5 0 4.5 10 9 10H20 M17 14l3 3-3 3 M4 17h3.5c1.4 0 2.4-.9 3.2-2.2 M13.2 9.2C14 7.9 15 7 16.500 7H20 M17 4l3 3-3 3",
  warn: "M12 4 2.800 19.500h18.400z M12 10v4.500 M12 17h.01",
};

export function icon(name) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  node.setAttribute("viewBox", "0 0 24 24");
  node.setAttribute("class", "icon");
  node.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SHAPES[name]);
  node.append(path);
  return node;
}
