// Keeps the line's page up to date: asks for a few bytes five times a second, and for the rest only
// if something is new. No call is held open, so any number of screens may look.
"use strict";

const EVERY = 200; // milliseconds
const live = document.getElementById("live");
const said = document.getElementById("said");
const lost = document.getElementById("lost");
const evidence = document.getElementById("evidence");
let shown = ""; // what decides whether the page is old
let failures = 0;

function fade() {
  document.documentElement.style.setProperty("--evidence", evidence.value / 100);
  localStorage.setItem("evidence", evidence.value);
}

function loaded(image) {
  return image.decode().catch(() => undefined);
}

async function update(state) {
  const answer = await fetch(live.dataset.live);
  if (!answer.ok) throw new Error(answer.status);
  const made = document.createElement("div");
  made.innerHTML = await answer.text();
  // The picture and its evidence change together, without a flash between them.
  await Promise.all([...made.querySelectorAll(".picture img")].map(loaded));
  const focused = document.activeElement?.closest?.(".strip a")?.getAttribute("href");
  live.replaceChildren(...made.childNodes);
  if (focused) live.querySelector(`.strip a[href="${focused}"]`)?.focus();
  const word = live.querySelector(".word-box .word")?.textContent.trim() ?? "";
  const why = [...live.querySelectorAll(".word-box .why")].map((one) => one.textContent.trim());
  const part = live.querySelector(".facts dd")?.textContent.trim() ?? "";
  said.textContent = [word, ...why, part].join(". ");
}

async function look() {
  try {
    const answer = await fetch(live.dataset.state);
    if (answer.status === 401) return location.reload();
    if (!answer.ok) throw new Error(answer.status);
    const state = await answer.json();
    const silent = state.silent !== null;
    const lights = state.lights.map((light) => light.replace(/\d+ s$/, ""));
    const now = JSON.stringify([state.last, silent, lights, state.waiting]);
    if (now !== shown) {
      await update(state);
      shown = now;
    }
    const seconds = live.querySelector(".seconds");
    if (seconds && silent) seconds.textContent = state.silent;
    failures = 0;
  } catch {
    failures += 1;
  }
  lost.hidden = failures < 3;
  setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
}

// An image that is dropped on the page or chosen is judged like any other.
const form = document.getElementById("drop");
const dropped = document.getElementById("dropped");

async function judge(files, camera) {
  const body = new FormData();
  const now = new Date().toISOString().replace(/[-:]/g, "").replace("T", "-").slice(0, 15);
  [...files].forEach((file, number) => {
    const kind = file.name.split(".").pop();
    body.append("image", file, camera ? `camera-${now}-${number}.${kind}` : file.name);
  });
  dropped.textContent = "Judging …";
  try {
    const address = `${form.getAttribute("action")}?source=${camera ? "camera" : "predict"}`;
    const headers = { "X-CSRFToken": form.dataset.csrf, Accept: "application/json" };
    const answer = await fetch(address, { method: "POST", body, headers });
    const told = await answer.json();
    dropped.textContent = answer.ok ? "" : told.message;
  } catch {
    dropped.textContent = "The API does not answer";
  }
}

form.addEventListener("change", (event) => {
  judge(event.target.files, event.target.name === "camera");
  event.target.value = "";
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) judge(event.dataTransfer.files, false);
});

evidence.value = localStorage.getItem("evidence") ?? evidence.value;
evidence.addEventListener("input", fade);
fade();
look();
