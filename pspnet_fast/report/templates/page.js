"use strict";

const root = document.documentElement;

// Light or dark: as the system has it, until the button says otherwise. Paper is light.
const system = matchMedia("(prefers-color-scheme: dark)");
const button = document.getElementById("theme");
let chosen = null;
let printing = false;

function setTheme() {
  const dark = !printing && (chosen ?? (system.matches ? "dark" : "light")) === "dark";
  root.dataset.theme = dark ? "dark" : "light";
  button.textContent = dark ? "Light" : "Dark";
}

button.hidden = false;
button.addEventListener("click", () => {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  setTheme();
});
system.addEventListener("change", setTheme);
addEventListener("beforeprint", () => { printing = true; setTheme(); });
addEventListener("afterprint", () => { printing = false; setTheme(); });
setTheme();

// The charts. Their colours are variables of the style sheet, so that a change of theme draws nothing anew.
const text = "var(--text)", muted = "var(--muted)", line = "var(--line)";
const options = {
  renderer: "svg",
  actions: false,
  ast: true, // expressions are interpreted: the page needs no eval
  config: {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: {
      labelColor: muted, titleColor: text, domainColor: line, tickColor: line, gridColor: line,
      gridOpacity: 0.6, titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12,
    },
    legend: {
      orient: "bottom", columns: 4, labelColor: text, title: null, labelLimit: 260, labelFontSize: 12,
      layout: { bottom: { direction: "vertical" } },
    },
    line: { strokeWidth: 2 },
  },
};
const charts = JSON.parse(document.getElementById("charts").textContent);
const drawn = [...document.querySelectorAll("[data-chart]")].map(
  (place) => window.vegaEmbed(place, charts[place.dataset.chart], options),
);
Promise.all(drawn).then(() => { root.dataset.drawn = drawn.length; });

// The gallery: two of an image's layers in one place, the right one cut at the slider.
for (const entry of document.querySelectorAll(".compare")) {
  const stack = entry.querySelector(".stack");
  const slider = entry.querySelector("input");
  const sides = entry.querySelectorAll("select");
  const move = () => stack.style.setProperty("--at", `${slider.value}%`);
  const choose = () => {
    for (const side of sides) {
      for (const layer of stack.children) layer.classList.toggle(side.dataset.side, layer.dataset.layer === side.value);
    }
  };
  const drag = (event) => {
    if (!event.buttons) return;
    const box = stack.getBoundingClientRect();
    slider.value = (100 * (event.clientX - box.left)) / box.width;
    move();
  };
  slider.addEventListener("input", move);
  for (const side of sides) side.addEventListener("change", choose);
  stack.addEventListener("pointerdown", drag);
  stack.addEventListener("pointermove", drag);
  stack.addEventListener("dragstart", (event) => event.preventDefault());
  stack.classList.add("stacked");
  entry.querySelector(".controls").hidden = false;
  move();
  choose();
}
