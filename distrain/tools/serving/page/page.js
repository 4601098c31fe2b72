"use strict";
// Sends a picture to /predict and shows the classes as bars. It uses no library, and loads nothing from elsewhere.

const find = (id) => document.getElementById(id);
const drop = find("drop"), picture = find("picture"), file = find("file"), answer = find("answer");
// Of pictures that are sent in quick succession, the last one's answer is shown.
let latest = 0;

function row(name, value, share) {
  const line = document.createElement("div");
  line.className = "row";
  const label = document.createElement("span");
  label.className = "name";
  label.textContent = label.title = name;
  const bar = document.createElement("progress");
  bar.max = 1;
  bar.value = share;
  const number = document.createElement("span");
  number.className = "value";
  number.textContent = value;
  line.append(label, bar, number);
  return line;
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function rows(prediction) {
  if (prediction.class !== undefined) {
    const ranked = prediction.top ?? [prediction];
    return ranked.map((entry) => row(entry.class, percent(entry.probability), entry.probability));
  }
  if (prediction.probabilities !== undefined) {
    const ranked = Object.entries(prediction.probabilities).sort((a, b) => b[1] - a[1]);
    return ranked.map(([name, share]) => {
      const mark = prediction.labels.includes(name) ? "✓ " : "";
      return row(mark + name, percent(share), share);
    });
  }
  const numbers = Object.entries(prediction.numbers ?? { output: JSON.stringify(prediction) });
  return numbers.map(([name, value]) => row(name, typeof value === "number" ? value.toPrecision(5) : value, 0));
}

function say(text) {
  const line = document.createElement("p");
  line.className = "wrong";
  line.textContent = text;
  answer.replaceChildren(line);
}

async function predict(image) {
  const mine = ++latest;
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(image);
  picture.hidden = false;
  const form = new FormData();
  form.append("images", image);
  try {
    const response = await fetch("predict?top=5", { method: "POST", body: form });
    const content = await response.json();
    if (mine !== latest) return;
    if (response.ok) answer.replaceChildren(...rows(content.predictions[0]));
    else say(typeof content.detail === "string" ? content.detail : `error ${response.status}`);
  } catch (error) {
    if (mine === latest) say(`no answer from the server (${error.message})`);
  }
}

picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 128));
picture.addEventListener("error", () => { picture.hidden = true; });
file.addEventListener("change", () => { if (file.files.length) predict(file.files[0]); file.value = ""; });
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) predict(event.clipboardData.files[0]); });
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop" && event.dataTransfer.files.length) predict(event.dataTransfer.files[0]);
  });
}

find("curl").textContent = `curl -F images=@photo.jpg '${new URL("predict?top=5", location.href)}'`;
fetch("model").then((response) => response.json()).then((model) => {
  find("model").textContent = `${model.model}, ${model.name}: ${model.classes.length} ${model.task === "regression" ? "numbers" : "classes"}`;
}).catch(() => { find("model").textContent = "no answer from the server"; });
