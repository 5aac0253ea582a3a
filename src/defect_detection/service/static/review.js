// The queue without a reload for each image: keys, the next image at once, and one undo at a time.
"use strict";

const part = document.getElementById("part");
const blind = document.getElementById("blind");
const evidence = document.getElementById("evidence");
const said = document.getElementById("said");
const failed = document.getElementById("failed");
let busy = false;

function fade() {
  document.documentElement.style.setProperty("--evidence", evidence.value / 100);
  localStorage.setItem("evidence", evidence.value);
}

async function send(form, button) {
  if (busy) return;
  busy = true;
  failed.hidden = true;
  const body = new URLSearchParams(new FormData(form));
  if (button.name) body.set(button.name, button.value);
  try {
    const headers = { "X-Part": "1", "X-CSRFToken": part.dataset.csrf, Accept: "application/json" };
    const answer = await fetch(form.getAttribute("action"), { method: "POST", body, headers });
    if (answer.ok) {
      show(await answer.text());
    } else {
      const told = await answer.json().catch(() => ({ message: `Error ${answer.status}` }));
      failed.textContent = told.message;
      failed.hidden = false;
      if (answer.status === 401) location.reload();
    }
  } catch {
    failed.textContent = "The API does not answer. Nothing was saved; try again";
    failed.hidden = false;
  }
  busy = false;
}

function show(html) {
  part.innerHTML = html;
  const last = part.querySelector(".last p")?.textContent.trim() ?? "";
  const title = part.querySelector(".judge h2, .done h2")?.textContent.trim() ?? "";
  said.textContent = `${last}. Next: ${title}`;
  part.querySelector("h2")?.focus();
  const address = new URL(location);
  address.searchParams.delete("verdict");
  history.replaceState(null, "", address);
}

part.addEventListener("submit", (event) => {
  if (!event.target.matches("[data-act]")) return;
  event.preventDefault();
  send(event.target, event.submitter);
});

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input[name], select")) return;
  const key = event.key.toLowerCase();
  if (key === "b") {
    blind.checked = !blind.checked;
    blind.form.requestSubmit();
    return;
  }
  const button = part.querySelector(`button[data-key="${CSS.escape(key)}"]:not(:disabled)`);
  if (!button || event.repeat) return;
  event.preventDefault();
  send(button.form, button);
});

blind.addEventListener("change", () => blind.form.requestSubmit());

// A part that a phone photographs is judged, and then stands here.
const form = document.getElementById("drop");
form.addEventListener("change", async (event) => {
  const [file] = event.target.files;
  if (!file) return;
  const now = new Date().toISOString().replace(/[-:]/g, "").replace("T", "-").slice(0, 15);
  const body = new FormData();
  body.append("image", file, `camera-${now}.${file.name.split(".").pop()}`);
  const headers = { "X-CSRFToken": form.dataset.csrf, Accept: "application/json" };
  try {
    const answer = await fetch(`${form.getAttribute("action")}?source=camera`, { method: "POST", body, headers });
    const told = await answer.json();
    const id = told.predictions?.[0]?.id;
    if (id) location.search = `?verdict=${id}`;
    else throw new Error(told.message ?? "The verdict could not be logged");
  } catch (error) {
    failed.textContent = error.message;
    failed.hidden = false;
  }
});

evidence.value = localStorage.getItem("evidence") ?? evidence.value;
evidence.addEventListener("input", fade);
fade();
