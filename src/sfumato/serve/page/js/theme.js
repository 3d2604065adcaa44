// Light, dark, or as the system has it. A plain script before the page is drawn, so that nothing flashes.

(() => {
  const ORDER = ["auto", "light", "dark"];
  const WORDS = { auto: "as the system has them", light: "light", dark: "dark" };
  const kept = localStorage.getItem("sfumato-theme");
  let theme = ORDER.includes(kept) ? kept : "auto";
  document.documentElement.dataset.theme = theme;

  document.addEventListener("DOMContentLoaded", async () => {
    const { icon } = await import("./icons.js");
    const button = document.getElementById("theme");
    const show = () => {
      document.documentElement.dataset.theme = theme;
      button.replaceChildren(icon(theme));
      button.setAttribute("aria-label", `Colours: ${WORDS[theme]}`);
      button.title = `Colours: ${WORDS[theme]}`;
    };
    button.addEventListener("click", () => {
      theme = ORDER[(ORDER.indexOf(theme) + 1) % ORDER.length];
      localStorage.setItem("sfumato-theme", theme);
      show();
    });
    show();
  });
})();
