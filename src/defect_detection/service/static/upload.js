// Has images judged that are dropped, chosen or photographed.
"use strict";

// Returns what the API says: predictions, or a message. A photograph gets the time as its name, by
// which its part is known, since phones call all of them alike.
async function haveJudged(form, files, camera) {
  const body = new FormData();
  const now = new Date().toISOString().replace(/[-:]/g, "").replace("T", "-").slice(0, 15);
  [...files].forEach((file, number) => {
    const kind = file.name.split(".").pop();
    body.append("image", file, camera ? `camera-${now}-${number}.${kind}` : file.name);
  });
  const address = `${form.getAttribute("action")}?source=${camera ? "camera" : "predict"}`;
  const headers = { "X-CSRFToken": form.dataset.csrf, Accept: "application/json" };
  try {
    const answer = await fetch(address, { method: "POST", body, headers });
    const why = answer.status === 413 ? "At most 32 MB at a time" : `Error ${answer.status}`;
    return await answer.json().catch(() => ({ message: why }));
  } catch {
    return { message: "The API does not answer" };
  }
}
