// How strongly evidence is drawn over images, as the slider says; a browser remembers it.
"use strict";

const evidence = document.getElementById("evidence");

function fade() {
  document.documentElement.style.setProperty("--evidence", evidence.value / 100);
  localStorage.setItem("evidence", evidence.value);
}

evidence.value = localStorage.getItem("evidence") ?? evidence.value;
evidence.addEventListener("input", fade);
fade();
