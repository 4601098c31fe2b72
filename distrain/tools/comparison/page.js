"use strict";
// Draws the curves of the page's data as SVG. Text from runs is only ever put into text nodes and attributes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const LEFT = 56, RIGHT = 10, TOP = 8, BOTTOM = 34;
  const MOST_READ = 10, MOST_WITH_RANGE = 5;
  const shown = data.runs.map(() => true);
  let overSeconds = false;
  let logLoss = true;

  function element(name, attributes, parent) {
    const made = document.createElementNS(SVG, name);
    for (const key of Object.keys(attributes)) made.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(made);
    return made;
  }

  function html(name, text, parent, className) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    if (className) made.className = className;
    if (parent) parent.appendChild(made);
    return made;
  }

  // Seconds of training at a step: between the knots, time is linear.
  function secondsAt(knots, step) {
    if (knots.length < 2) return null;
    let low = 0, high = knots.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (knots[middle][0] <= step) low = middle; else high = middle;
    }
    const a = knots[low], b = knots[high];
    return b[0] === a[0] ? b[1] : a[1] + (step - a[0]) * (b[1] - a[1]) / (b[0] - a[0]);
  }

  // Steps are stored as differences, since these are shorter.
  function decode(stored) {
    let step = 0;
    const points = stored.s.map((more, index) => ({
      step: step += more,
      y: stored.v[index],
      low: (stored.l || stored.v)[index],
      high: (stored.h || stored.v)[index],
    }));
    for (const point of points) point.seconds = secondsAt(data.runs[stored.r].knots, point.step);
    return { run: stored.r, points, hasBand: Boolean(stored.l) };
  }

  function write(number) {
    if (number === 0) return "0";
    const size = Math.abs(number);
    if (size >= 1e6 || size < 1e-3) return number.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return Number(number.toPrecision(5)).toLocaleString("en-US", { maximumFractionDigits: 6 });
  }

  function linearTicks(low, high, count) {
    const rough = (high - low) / Math.max(count, 1);
    const power = Math.pow(10, Math.floor(Math.log10(rough)));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const ticks = [];
    for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) ticks.push(index * step);
    return ticks;
  }

  function logTicks(low, high) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high));
    const every = Math.max(1, Math.ceil((last - first) / 5));
    const factors = last - first <= 2 ? [1, 2, 5] : [1];
    const ticks = [];
    for (let power = first; power <= last; power += every) {
      for (const factor of factors) ticks.push(factor * Math.pow(10, power));
    }
    return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }

  class Chart {
    constructor(figure, stored) {
      this.title = stored.title;
      this.isLoss = stored.loss;
      this.curves = stored.curves.map(decode);
      this.svg = figure.querySelector(".plot");
      this.readout = figure.querySelector(".readout");
      this.note = figure.querySelector(".note");
      this.at = null;
      this.svg.addEventListener("pointermove", (event) => this.point(event));
      this.svg.addEventListener("pointerdown", (event) => this.point(event));
      this.svg.addEventListener("pointerleave", () => this.read(null));
      this.svg.addEventListener("blur", () => this.read(null));
      this.svg.addEventListener("keydown", (event) => this.key(event));
    }

    x(point) { return overSeconds ? point.seconds : point.step; }

    visible() {
      return this.curves.filter((curve) => shown[curve.run] && !(overSeconds && data.runs[curve.run].knots.length < 2));
    }

    draw() {
      const width = Math.max(this.svg.clientWidth, 200), height = Math.max(this.svg.clientHeight, 120);
      this.width = width;
      this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      this.svg.replaceChildren();
      this.read(null);
      const curves = this.visible();
      const all = curves.flatMap((curve) => curve.points).filter((point) => point.y !== null);
      const positive = all.filter((point) => point.y > 0);
      this.log = this.isLoss && logLoss && positive.length > 0;
      const drawn = this.log ? positive : all;
      const notes = [];
      if (drawn.length < all.length) notes.push(`${all.length - drawn.length} values of 0 or less have no logarithm and are not drawn.`);
      const broken = curves.filter((curve) => curve.points.some((point) => point.y === null));
      if (broken.length) notes.push(`Not finite in places: ${broken.slice(0, 5).map((curve) => data.runs[curve.run].name).join(", ")}${broken.length > 5 ? " …" : ""}.`);
      this.note.textContent = notes.join(" ");
      if (!drawn.length) {
        element("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, this.svg).textContent = "nothing to draw";
        this.toX = null;
        return;
      }
      let lowest = Infinity, highest = -Infinity, longest = 0;
      for (const point of drawn) {
        lowest = Math.min(lowest, this.log && point.low <= 0 ? point.y : point.low);
        highest = Math.max(highest, point.high);
        longest = Math.max(longest, this.x(point));
      }
      longest = longest || 1;
      if (this.log) {
        if (highest / lowest < 1.5) { lowest /= 1.25; highest *= 1.25; }
      } else {
        const margin = (highest - lowest) * 0.05 || Math.abs(highest) * 0.1 || 1;
        lowest -= margin; highest += margin;
      }
      const scale = this.log ? Math.log10 : (value) => value;
      const range = scale(highest) - scale(lowest);
      this.longest = longest;
      this.toX = (value) => LEFT + (value / longest) * (width - LEFT - RIGHT);
      this.toY = (value) => height - BOTTOM - ((scale(value) - scale(lowest)) / range) * (height - TOP - BOTTOM);
      for (const tick of this.log ? logTicks(lowest, highest) : linearTicks(lowest, highest, 5)) {
        const y = this.toY(tick);
        element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }, this.svg);
        element("text", { x: LEFT - 5, y: y + 4, "text-anchor": "end" }, this.svg).textContent = write(tick);
      }
      for (const tick of linearTicks(0, longest, width / 90)) {
        const x = this.toX(tick);
        element("line", { class: "grid", x1: x, x2: x, y1: height - BOTTOM, y2: height - BOTTOM + 4 }, this.svg);
        const anchor = x > width - 30 ? "end" : "middle";
        element("text", { x, y: height - BOTTOM + 15, "text-anchor": anchor }, this.svg).textContent = write(tick);
      }
      element("text", { x: (LEFT + width - RIGHT) / 2, y: height - 3, "text-anchor": "middle" }, this.svg).textContent =
        overSeconds ? "seconds of training" : "steps";
      this.bottom = lowest;
      for (const curve of curves) if (curve.hasBand) this.drawBand(curve);
      for (const curve of curves) this.drawCurve(curve);
      this.marker = element("line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" }, this.svg);
    }

    // From the lowest to the highest value of each stretch of steps.
    drawBand(curve) {
      let upper = [], lower = [], path = "";
      const end = () => {
        if (upper.length > 1) path += `M${upper.join("L")}L${lower.reverse().join("L")}Z`;
        upper = [];
        lower = [];
      };
      for (const point of curve.points) {
        if (point.y === null || (this.log && point.y <= 0)) { end(); continue; }
        const x = this.toX(this.x(point)).toFixed(1);
        upper.push(`${x} ${this.toY(point.high).toFixed(1)}`);
        lower.push(`${x} ${this.toY(Math.max(point.low, this.bottom)).toFixed(1)}`);
      }
      end();
      element("path", { class: `band ${data.runs[curve.run].style}`, d: path }, this.svg);
    }

    drawCurve(curve) {
      const style = data.runs[curve.run].style;
      let path = "", alone = null, length = 0;
      const dot = () => {
        if (length === 1) element("circle", { class: style, cx: alone[0], cy: alone[1], r: 2.5 }, this.svg);
        length = 0;
      };
      for (const point of curve.points) {
        if (point.y === null || (this.log && point.y <= 0)) { dot(); continue; }
        const x = this.toX(this.x(point)), y = this.toY(point.y);
        path += `${length ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
        alone = [x, y];
        length++;
      }
      dot();
      element("path", { class: `curve ${style}`, d: path }, this.svg);
    }

    point(event) {
      if (!this.toX) return;
      const box = this.svg.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      this.read(Math.min(Math.max(share, 0), 1) * this.longest, event.clientY - box.top);
    }

    key(event) {
      if (!this.toX) return;
      const size = this.longest / (event.shiftKey ? 10 : 50);
      const now = this.at === null ? 0 : this.at;
      const moves = { ArrowRight: this.at === null ? 0 : now + size, ArrowLeft: now - size, Home: 0, End: this.longest };
      if (event.key === "Escape") this.read(null);
      else if (event.key in moves) {
        event.preventDefault();
        this.read(Math.min(Math.max(moves[event.key], 0), this.longest));
      }
    }

    // Shows the values at a place of the x axis: of each run its nearest point; of many runs those nearest to the pointer.
    read(at, pointerY) {
      this.at = at;
      this.readout.replaceChildren();
      if (this.marker) this.marker.setAttribute("visibility", at === null ? "hidden" : "visible");
      if (at === null) return;
      const x = this.toX(at);
      this.marker.setAttribute("x1", x);
      this.marker.setAttribute("x2", x);
      let found = [];
      for (const curve of this.visible()) {
        const nearest = nearestPoint(curve.points, at, (point) => this.x(point));
        if (nearest) found.push({ run: curve.run, point: nearest });
      }
      if (found.length > MOST_READ && pointerY !== undefined) {
        const away = (entry) => (entry.point.y === null || (this.log && entry.point.y <= 0)) ? 1e9 : Math.abs(this.toY(entry.point.y) - pointerY);
        found.sort((a, b) => away(a) - away(b));
      }
      const more = found.length - MOST_READ;
      found = found.slice(0, MOST_READ);
      found.sort((a, b) => (b.point.y ?? -Infinity) - (a.point.y ?? -Infinity));
      this.readout.className = `readout ${x > this.width / 2 ? "left" : "right"}`;
      html("div", overSeconds ? `${write(Number(at.toPrecision(4)))} s` : `step ${Math.round(at).toLocaleString("en-US")}`, this.readout);
      for (const entry of found) {
        const row = html("div", null, this.readout);
        row.appendChild(sample(data.runs[entry.run].style));
        html("span", data.runs[entry.run].name, row);
        html("b", entry.point.y === null ? "not finite" : write(entry.point.y), row);
        if (found.length <= MOST_WITH_RANGE && entry.point.low !== entry.point.high) html("span", `${write(entry.point.low)} to ${write(entry.point.high)}`, row, "dim");
      }
      if (more > 0) html("div", `and ${more} more`, this.readout);
    }
  }

  function nearestPoint(points, at, x) {
    let low = 0, high = points.length - 1;
    // A run that ended before has no value here.
    if (high < 0 || at > x(points[high]) * 1.02) return null;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (x(points[middle]) <= at) low = middle; else high = middle;
    }
    return Math.abs(x(points[low]) - at) <= Math.abs(x(points[high]) - at) ? points[low] : points[high];
  }

  function sample(style) {
    const svg = element("svg", { width: 26, height: 8, "aria-hidden": "true" });
    element("path", { class: `curve ${style}`, d: "M0 4H26", "stroke-width": 2.5 }, svg);
    return svg;
  }

  const charts = data.charts.map((stored, index) => new Chart(document.getElementById(`chart-${index}`), stored));
  const drawAll = () => charts.forEach((chart) => chart.draw());

  const buttons = data.runs.map((run, index) => {
    const button = document.getElementById(`run-${index}`);
    button.prepend(sample(run.style));
    button.addEventListener("click", () => show(index, !shown[index]));
    // A double click shows this run alone.
    button.addEventListener("dblclick", () => { shown.fill(false); show(index, true); });
    return button;
  });
  function show(index, on) {
    shown[index] = on;
    update();
  }
  function update() {
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(shown[index])));
    drawAll();
  }
  const controls = document.getElementById("controls");
  controls.addEventListener("change", () => {
    overSeconds = controls.querySelector("[name=axis]:checked").value === "seconds";
    logLoss = controls.querySelector("[name=log]").checked;
    drawAll();
  });
  document.getElementById("all").addEventListener("click", () => { shown.fill(true); update(); });
  document.getElementById("none").addEventListener("click", () => { shown.fill(false); update(); });
  controls.hidden = false;
  // Browsers keep the state of controls over a reload.
  controls.dispatchEvent(new Event("change"));
  let waiting = 0;
  new ResizeObserver(() => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(drawAll);
  }).observe(document.getElementById("charts"));
})();
