"use strict";

// Lighting a line of a sheet: its box in the picture, and the training image that it looks like.

function light(card, mark) {
  for (const lit of card.querySelectorAll("[data-mark].lit")) lit.classList.remove("lit");
  for (const part of card.querySelectorAll(`[data-mark="${mark}"]`)) part.classList.add("lit");
  const row = card.querySelector(`tr[data-mark="${mark}"]`);
  const tile = document.getElementById(`prototype-${row.dataset.prototype}`);
  const source = card.querySelector(".source");
  const scene = tile.querySelector(".scene").cloneNode(true);
  const [x0, y0, x1, y1] = row.dataset.sourceBox.split(" ").map(Number);
  for (const edge of scene.querySelectorAll(".box rect")) {
    const sides = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    for (const [name, value] of Object.entries(sides)) edge.setAttribute(name, value);
  }
  source.querySelector(".scene").replaceWith(scene);
  source.querySelector(".likeness").textContent = row.dataset.likeness;
  source.querySelector(".name").textContent = tile.dataset.name;
  source.querySelector(".file").textContent = tile.querySelector(".file").textContent;
}

function lightTarget(event) {
  const part = event.target.closest(".card [data-mark]");
  if (part && !part.classList.contains("lit")) light(part.closest(".card"), part.dataset.mark);
}

for (const type of ["pointerover", "focusin", "click"]) {
  document.addEventListener(type, lightTarget);
}

// Choosing the images to show.

const filters = document.querySelector(".filters");
const cards = [...document.querySelectorAll(".card")];

function isChosen(card) {
  const label = filters.elements.label.value;
  const verdict = filters.elements.verdict?.value;
  const isWrong = card.classList.contains("wrong");
  return (!label || card.dataset.labels.split(" ").includes(label))
    && (!verdict || isWrong === (verdict === "wrong"));
}

function choose() {
  for (const card of cards) card.hidden = !isChosen(card);
  const shown = cards.filter((card) => !card.hidden).length;
  filters.querySelector("output").textContent =
    shown === cards.length ? `All ${shown} images` : `${shown} of ${cards.length} images`;
}

filters.hidden = false;
filters.addEventListener("change", choose);
filters.addEventListener("submit", (event) => event.preventDefault());
addEventListener("pageshow", choose); // browsers restore a choice on the way back

// A link to a prototype unfolds the gallery, and so does printing.

const gallery = document.querySelector(".gallery");

document.addEventListener("click", (event) => {
  if (event.target.closest('a[href^="#prototype-"]')) gallery.open = true;
});
addEventListener("beforeprint", () => { gallery.open = true; });
