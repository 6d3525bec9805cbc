"use strict";
// Draws the charts of the page from its data.  All panels share the x axis, and so its zoom.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const hidden = new Set();
  let zoom = null; // [lowest, highest] x, or null for all
  const panels = data.panels.map(makePanel);
  panels.forEach(draw);

  function element(name, attributes, parent, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function makePanel(content, index) {
    const figure = document.createElement("figure");
    const main = index === 0;
    if (main) figure.className = "main";
    document.getElementById("charts").appendChild(figure);
    const width = main ? 1060 : 525, height = main ? 400 : 230;
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}` }, figure);
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.appendChild(tip);
    const panel = { content, main, width, height, svg, tip, figure, left: 62, right: 12, top: 10, bottom: 42 };
    if (main) addLegend(figure);
    listen(panel);
    return panel;
  }

  function addLegend(figure) {
    const legend = document.createElement("div");
    legend.className = "legend";
    const seen = new Map();
    for (const panel of data.panels)
      for (const line of panel.lines) if (line.label && !seen.has(line.label)) seen.set(line.label, line.colour);
    for (const [label, colour] of seen) {
      const name = document.createElement("span");
      const swatch = document.createElement("i");
      swatch.style.background = colour;
      name.append(swatch, label);
      name.onclick = () => {
        name.classList.toggle("off", !hidden.delete(label));
        if (name.classList.contains("off")) hidden.add(label);
        panels.forEach(draw);
      };
      legend.appendChild(name);
    }
    for (const { kind, label, colour } of data.kinds) {
      const name = document.createElement("span");
      name.className = "mark";
      const sign = element("svg", { viewBox: "0 0 18 10" }, name);
      if (kind !== "growth") element("path", { d: "M9,9l-4,-8h8z", fill: colour }, sign);
      else element("line", { x1: 0, x2: 18, y1: 5, y2: 5, stroke: colour, "stroke-dasharray": data.logX ? "2 3" : "6 4" }, sign);
      if (kind === "growth" && data.logX) element("path", { d: "M9,1l4,4l-4,4l-4,-4z", fill: "#fff", stroke: colour }, sign);
      name.append(label);
      legend.appendChild(name);
    }
    figure.appendChild(legend);
  }

  function shown(panel) {
    const lines = panel.content.lines;
    // A pale line has no name: it goes with the thick one that follows it.  So do a schedule's later stages,
    // with the first that has the colour.
    const owner = (line, i) => (line.style === "raw" ? lines[i + 1] : lines.find((each) => each.colour === line.colour));
    return lines.filter((line, i) => !hidden.has(line.label || (owner(line, i) || {}).label));
  }

  function range(values, log) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value === null || (log && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low === Infinity) return log ? [1, 10] : [0, 1];
    if (log) return low === high ? [low / 1.1, high * 1.1] : [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    const space = (high - low || Math.abs(high) || 1) * 0.05;
    return [low - space, high + space];
  }

  function* inside(lines, key) {
    for (const line of lines)
      for (let i = 0; i < line.x.length; i++)
        if (!zoom || (line.x[i] >= zoom[0] && line.x[i] <= zoom[1])) yield line[key][i];
  }

  function allX() {
    return range(data.panels.flatMap((panel) => panel.lines.flatMap((line) => line.x)), data.logX);
  }

  function scale([low, high], log, from, to) {
    const f = log ? Math.log10 : (value) => value;
    const a = f(low), b = f(high);
    const at = (value) => from + ((f(value) - a) / (b - a)) * (to - from);
    at.back = (pixel) => {
      const value = a + ((pixel - from) / (to - from)) * (b - a);
      return log ? 10 ** value : value;
    };
    return at;
  }

  function ticks([low, high], log, count) {
    if (log && high / low > 8) {
      const found = [];
      const fine = high / low < 300 ? [1, 2, 5] : [1];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const part of fine) if (part * 10 ** e >= low && part * 10 ** e <= high) found.push(part * 10 ** e);
      const step = Math.ceil(found.length / (count + 2));
      return found.filter((_, i) => i % step === 0);
    }
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((part) => part * power >= rough);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step)
      found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
    return found;
  }

  function toldX(value) {
    return data.logX && value >= 1e6 ? value.toExponential(2).replace(/\.?0*e\+/, "e") : told(value);
  }

  function told(value, percent) {
    if (value === null) return "-";
    if (percent) return (100 * value).toPrecision(3) + " %";
    const size = Math.abs(value);
    if (size >= 1e15 || (size < 1e-3 && size > 0)) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
    for (const [unit, power] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["k", 1e4]])
      if (size >= power) return +(value / (unit === "k" ? 1e3 : power)).toPrecision(4) + unit;
    return String(+value.toPrecision(5));
  }

  function draw(panel) {
    const { svg, content, width, height, left, right, top, bottom } = panel;
    svg.replaceChildren();
    const lines = shown(panel);
    const xs = zoom || allX(), ys = range(inside(lines, "y"), content.logY);
    if (content.fromZero) ys[0] = 0;
    if (content.top !== null && !zoom) ys[1] = Math.min(ys[1], content.top);
    const x = (panel.x = scale(xs, data.logX, left, width - right));
    const y = (panel.y = scale(ys, content.logY, height - bottom, top));
    const clip = `clip${panels ? panels.indexOf(panel) : 0}-${width}`;
    const area = { x: left, y: top, width: width - left - right, height: height - top - bottom };
    element("rect", area, element("clipPath", { id: clip }, svg));
    for (const value of ticks(xs, data.logX, panel.main ? 9 : 5)) {
      element("line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }, svg);
      element("text", { x: x(value), y: height - bottom + 15, "text-anchor": "middle" }, svg, toldX(value));
    }
    for (const value of ticks(ys, content.logY, panel.main ? 7 : 5)) {
      element("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }, svg);
      const text = told(value, content.percent);
      element("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, svg, text);
    }
    element("path", { class: "axis", d: `M${left},${top}V${height - bottom}H${width - right}` }, svg);
    element("text", { class: "label", x: (left + width - right) / 2, y: height - 8, "text-anchor": "middle" }, svg, data.xLabel);
    const turned = { class: "label", x: -(top + height - bottom) / 2, y: 13, transform: "rotate(-90)", "text-anchor": "middle" };
    element("text", turned, svg, content.yLabel);
    const inner = element("g", { "clip-path": `url(#${clip})` }, svg);
    for (const line of lines) drawLine(inner, line, x, y, content.logY);
    for (const mark of data.marks) drawMark(panel, inner, mark, x, y);
    panel.cross = element("line", { stroke: "#999", "stroke-dasharray": "3 3", y1: top, y2: height - bottom, visibility: "hidden" }, svg);
    panel.box = element("rect", { fill: "#0072b2", opacity: 0.15, y: top, height: area.height, visibility: "hidden" }, svg);
  }

  function drawLine(group, line, x, y, logY) {
    let path = "", pen = false;
    const good = (i) => line.y[i] !== null && !(logY && line.y[i] <= 0);
    for (let i = 0; i < line.x.length; i++) {
      if (!good(i)) {
        pen = false;
        continue;
      }
      path += `${pen ? "L" : "M"}${x(line.x[i]).toFixed(1)},${y(line.y[i]).toFixed(1)}`;
      pen = true;
    }
    const raw = line.style === "raw";
    const look = { d: path, fill: "none", stroke: line.colour, "stroke-linejoin": "round", "stroke-dasharray": line.dashed ? "6 3" : "none" };
    element("path", { ...look, "stroke-width": raw ? 0.7 : 1.8, opacity: raw ? 0.4 : 1 }, group);
    if (line.style === "points" && line.x.length < 400)
      for (let i = 0; i < line.x.length; i++)
        if (good(i)) element("circle", { cx: x(line.x[i]), cy: y(line.y[i]), r: 2.4, fill: line.colour }, group);
  }

  function drawMark(panel, group, mark, x, y) {
    const at = x(mark.x), bottom = panel.height - panel.bottom;
    if (!(at >= panel.left - 1 && at <= panel.width - panel.right + 1)) return;
    if (mark.kind === "growth") {
      const dash = mark.y === null ? "6 4" : "2 3";
      element("line", { x1: at, x2: at, y1: panel.top, y2: bottom, stroke: mark.colour, "stroke-dasharray": dash }, group);
      if (mark.y !== null) {
        const d = `M${at},${y(mark.y) - 7}l7,7l-7,7l-7,-7z`;
        element("title", {}, element("path", { d, fill: "#fff", stroke: mark.colour, "stroke-width": 1.5 }, group), mark.text);
      }
      if (panel.main && mark.y === null) {
        const where = { x: -panel.top - 4, y: at - 4, transform: "rotate(-90)", "text-anchor": "end" };
        element("text", where, group, mark.text);
      }
    } else {
      const d = `M${at},${bottom - 1}l-4,-8h8z`;
      element("title", {}, element("path", { d, fill: mark.colour }, group), mark.text);
    }
  }

  function nearest(line, value) {
    let low = 0, high = line.x.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (line.x[middle] <= value) low = middle;
      else high = middle;
    }
    return Math.abs(line.x[low] - value) <= Math.abs(line.x[high] - value) ? low : high;
  }

  function listen(panel) {
    const { svg } = panel;
    let begun = null;
    const place = (event) => {
      const box = svg.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * panel.width;
      return Math.min(Math.max(at, panel.left), panel.width - panel.right);
    };
    svg.addEventListener("mousemove", (event) => {
      const at = place(event);
      if (begun !== null) {
        const size = { x: Math.min(at, begun), width: Math.abs(at - begun), visibility: "visible" };
        for (const [key, value] of Object.entries(size)) panel.box.setAttribute(key, value);
      }
      read(panel, at, event);
    });
    svg.addEventListener("mousedown", (event) => {
      begun = place(event);
      event.preventDefault();
    });
    window.addEventListener("mouseup", (event) => {
      if (begun === null) return;
      const at = place(event), from = begun;
      begun = null;
      if (Math.abs(at - from) > 5) {
        zoom = [panel.x.back(Math.min(at, from)), panel.x.back(Math.max(at, from))];
        panels.forEach(draw);
      } else panel.box.setAttribute("visibility", "hidden");
    });
    svg.addEventListener("dblclick", () => {
      zoom = null;
      panels.forEach(draw);
    });
    svg.addEventListener("mouseleave", () => {
      panel.tip.hidden = true;
      for (const each of panels) each.cross.setAttribute("visibility", "hidden");
    });
  }

  function read(panel, at, event) {
    const value = panel.x.back(at);
    panel.tip.replaceChildren();
    const add = (text, colour) => {
      const row = document.createElement("div");
      if (colour) {
        const swatch = document.createElement("i");
        swatch.style.background = colour;
        row.appendChild(swatch);
      }
      row.append(text);
      panel.tip.appendChild(row);
    };
    add(`${data.xLabel} ${toldX(value)}`);
    for (const line of shown(panel)) {
      if (!line.label || value < line.x[0] || value > line.x[line.x.length - 1]) continue;
      const i = nearest(line, value);
      add(`${line.label}: ${told(line.y[i], panel.content.percent)}`, line.colour);
    }
    for (const mark of data.marks) if (Math.abs(panel.x(mark.x) - at) < 5) add(mark.text, mark.colour);
    for (const each of panels) {
      const here = each.x(value);
      for (const key of ["x1", "x2"]) each.cross.setAttribute(key, here);
      each.cross.setAttribute("visibility", "visible");
    }
    const box = panel.figure.getBoundingClientRect();
    panel.tip.hidden = false;
    const left = event.clientX - box.left, over = left > box.width / 2;
    panel.tip.style.left = over ? "auto" : `${left + 14}px`;
    panel.tip.style.right = over ? `${box.width - left + 14}px` : "auto";
    panel.tip.style.top = `${event.clientY - box.top + 10}px`;
  }
})();
