// The queue without a reload for each image: keys, the next image at once, and one undo at a time.
"use strict";

const PATIENCE = 10000; // milliseconds, for an answer
const LOOK = 400; // milliseconds for which a new image is seen before it can be judged
const part = document.getElementById("part");
const blind = document.getElementById("blind");
const said = document.getElementById("said");
const failed = document.getElementById("failed");
let busy = false;

function work(now) {
  busy = now;
  part.setAttribute("aria-busy", now);
}

function tell(message) {
  failed.textContent = message;
  failed.hidden = !message;
}

async function send(form, button) {
  if (busy) return;
  work(true);
  tell("");
  const body = new URLSearchParams(new FormData(form));
  if (button.name) body.set(button.name, button.value);
  const headers = { "X-Part": "1", "X-CSRFToken": part.dataset.csrf, Accept: "application/json" };
  const options = { method: "POST", body, headers, signal: AbortSignal.timeout(PATIENCE) };
  try {
    const answer = await fetch(form.getAttribute("action"), options);
    if (answer.ok) await show(await answer.text());
    else await refused(answer);
  } catch {
    tell("The API does not answer. The label may not have been saved; load the page again");
  }
  work(false);
}

async function refused(answer) {
  const told = await answer.json().catch(() => ({ message: `Error ${answer.status}` }));
  tell(told.message);
  // The sign-in has ended or is a newer one, or the image was judged or deleted meanwhile.
  if ([400, 401, 404, 409, 410].includes(answer.status)) {
    await new Promise((go) => setTimeout(go, 2500));
    location.assign(location.pathname + (blind.checked ? "?blind=1" : ""));
  }
}

async function show(html) {
  part.innerHTML = html;
  const last = part.querySelector(".last p")?.textContent.trim() ?? "";
  const heading = part.querySelector(".judge h2, .done h2");
  said.textContent = `${last}. Next: ${heading?.textContent.trim() ?? ""}`;
  heading?.focus({ preventScroll: true });
  const address = new URL(location);
  address.searchParams.delete("verdict");
  history.replaceState(null, "", address);
  // A second press of a key, or tap of a glove, must not judge what nobody has seen.
  const pictures = [...part.querySelectorAll(".picture img")].map((one) => one.decode());
  await Promise.all([Promise.allSettled(pictures), new Promise((go) => setTimeout(go, LOOK))]);
}

part.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-act]")) return;
  event.preventDefault();
  send(event.target, event.submitter);
});

function changeMode() {
  const address = new URL(location);
  const verdict = part.querySelector("[data-verdict]")?.dataset.verdict;
  address.search = "";
  if (blind.checked) address.searchParams.set("blind", "1");
  if (verdict) address.searchParams.set("verdict", verdict);
  location.assign(address);
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  if (key === "b") {
    blind.checked = !blind.checked;
    changeMode();
    return;
  }
  const button = part.querySelector(`button[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (!button) return;
  event.preventDefault();
  send(button.form, button);
});

blind.addEventListener("change", changeMode);

// A part that a phone photographs is judged, and then stands here.
const form = document.getElementById("drop");
form.addEventListener("change", async (event) => {
  const files = [...event.target.files];
  if (!files.length) return;
  while (busy) await new Promise((go) => setTimeout(go, 50));
  work(true);
  tell("Judging …");
  const told = await haveJudged(form, files, true);
  const id = told.predictions?.[0]?.id;
  if (id) location.search = `?verdict=${id}`;
  else if (told.status === 401) location.reload();
  else tell(told.message ?? "The image was judged, but could not be kept");
  work(false);
});
