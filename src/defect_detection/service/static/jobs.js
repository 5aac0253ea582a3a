// Follows the job that is shown, and loads the page again when it has ended.
"use strict";

const job = document.getElementById("job");
const log = document.getElementById("log");
const progress = document.getElementById("progress");
const gone = document.getElementById("gone");

async function look() {
  try {
    const answer = await fetch(job.dataset.address);
    gone.hidden = answer.ok;
    if (answer.ok) {
      const found = await answer.json();
      if (found.state !== "running") return location.reload();
      const { epoch, epochs } = found.progress;
      if (epochs) {
        const bar = document.createElement("progress");
        bar.max = epochs;
        bar.value = epoch;
        bar.setAttribute("aria-label", "Epochs");
        progress.replaceChildren(bar, ` epoch ${epoch} of ${epochs}`);
      }
      const output = await fetch(job.dataset.log);
      const atEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 40;
      log.textContent = (await output.text()).split("\n").slice(-200).join("\n");
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch {
    gone.hidden = false;
  }
  setTimeout(look, 1500);
}

if (job?.dataset.state === "running") look();
if (log) log.scrollTop = log.scrollHeight;
