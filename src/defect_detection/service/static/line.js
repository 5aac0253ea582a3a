// Keeps the line's page up to date: asks for a few bytes five times a second, and for the rest only
// if something is new. No call is held open, so any number of screens may look.
"use strict";

const EVERY = 200; // milliseconds
const PATIENCE = 3000; // milliseconds, for an answer
const GONE_AFTER = 2000; // milliseconds without an answer
const PICTURES = 300; // milliseconds, for the pictures: the word does not wait for them
const live = document.getElementById("live");
const said = document.getElementById("said");
const lost = document.getElementById("lost");
let shown = ""; // what decides whether the page is old
let answered = Date.now(); // when the API answered last

async function ask(address) {
  const answer = await fetch(address, { signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 401) location.reload();
  if (!answer.ok) throw new Error(answer.status);
  return answer;
}

function loaded(image) {
  return image.decode().catch(() => undefined);
}

async function update() {
  const made = document.createElement("div");
  made.innerHTML = await (await ask(live.dataset.live)).text();
  // The picture and its evidence change together, without a flash between them.
  const pictures = [...made.querySelectorAll(".picture img")].map(loaded);
  await Promise.race([Promise.all(pictures), new Promise((go) => setTimeout(go, PICTURES))]);
  const focused = document.activeElement?.closest?.("#live a")?.getAttribute("href");
  const scrolled = live.querySelector(".strip")?.scrollLeft ?? 0;
  live.replaceChildren(...made.childNodes);
  if (scrolled) live.querySelector(".strip").scrollLeft = scrolled;
  if (focused) live.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus();
  const word = live.querySelector(".word-box .word")?.textContent.trim() ?? "";
  const why = [...live.querySelectorAll(".word-box .why")].map((one) => one.textContent.trim());
  const part = live.querySelector(".facts dd")?.textContent.trim() ?? "";
  const told = [word, ...why, part].join(". ");
  if (said.textContent !== told) said.textContent = told;
}

async function look() {
  try {
    const state = await (await ask(live.dataset.state)).json();
    const silent = state.silent !== null;
    const now = JSON.stringify({ ...state, silent });
    if (now !== shown) {
      await update();
      shown = now;
    }
    const seconds = live.querySelector(".seconds");
    if (seconds && silent) seconds.textContent = state.silent;
    answered = Date.now();
  } catch {
    // Said below, if it lasts.
  }
  const gone = Date.now() - answered > GONE_AFTER;
  lost.hidden = !gone;
  document.body.classList.toggle("gone", gone);
  setTimeout(look, document.hidden ? 5 * EVERY : EVERY);
}

// An image that is dropped on the page or chosen is judged like any other.
const form = document.getElementById("drop");
const dropped = document.getElementById("dropped");

async function judge(files, camera) {
  dropped.textContent = "Judging …";
  dropped.textContent = (await haveJudged(form, files, camera)).message ?? "";
}

form.addEventListener("change", (event) => {
  judge([...event.target.files], event.target.name === "camera");
  event.target.value = "";
});
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) judge(event.dataTransfer.files, false);
});

look();
