"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // every opacity slider sets the one opacity of the page
  const sliders = all("#opacity, .opacity");
  const fade = (value) => {
    document.documentElement.style.setProperty("--ov", value / 100);
    for (const other of sliders) other.value = value;
  };
  for (const slider of sliders) slider.addEventListener("input", () => fade(slider.value));
  if (sliders.length) fade(sliders[0].value);

  for (const button of all("[data-fold]")) {
    button.addEventListener("click", () => {
      for (const part of all("details.class")) part.open = button.dataset.fold === "open";
    });
  }

  // a link to a folded class unfolds it
  const unfold = () => {
    const part = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (part && part.tagName === "DETAILS") part.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();

  // a picture, large: the raw image is shared between pictures by reference, so it is copied in beside its layers
  const dialog = document.getElementById("large");
  for (const picture of all(".pic")) {
    picture.addEventListener("click", () => {
      for (const old of all("svg", dialog)) old.remove();
      const copy = picture.querySelector("svg").cloneNode(true);
      for (const image of all("image[id]", copy)) image.removeAttribute("id");
      const box = copy.viewBox.baseVal;
      const scale = Math.min((innerWidth * 0.94) / box.width, (innerHeight * 0.84) / box.height);
      copy.style.width = box.width * scale + "px";
      dialog.append(copy);
      dialog.showModal();
    });
  }
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });

  // slice viewers; three in an .ortho move together
  const numbers = (text) => text.split(",").map(Number);
  const nearest = (values, wanted) =>
    values.reduce((best, value, k) => (Math.abs(value - wanted) < Math.abs(values[best] - wanted) ? k : best), 0);
  for (const viewer of all(".viewer")) {
    const slider = viewer.querySelector(".z");
    const svg = viewer.querySelector("svg");
    const ortho = viewer.closest(".ortho");
    const scope = ortho ?? viewer;
    const choice = scope.querySelector("select");
    const positions = viewer.dataset.z.split(",");
    const height = Number(viewer.dataset.height);
    const move = () => {
      const top = slider.value * height;
      svg.setAttribute("viewBox", `0 ${top} ${viewer.dataset.width} ${height}`);
      viewer.querySelector(".fixed").setAttribute("transform", `translate(0 ${top})`);
      viewer.querySelector("output").textContent = `${viewer.dataset.name ?? "z"} = ${positions[slider.value]} nm`;
      if (!ortho) return;
      const at = numbers(viewer.dataset.offsets)[slider.value];
      for (const line of all(`.cross[data-of="${viewer.dataset.axis}"]`, ortho)) {
        const pane = line.closest(".viewer");
        const rows = pane.dataset.axis === "0" ? "1" : "0"; // the axis that runs down in that pane
        const along = viewer.dataset.axis === rows;
        const [width, tall] = [pane.dataset.width, pane.dataset.height];
        const ends = along ? { x1: 0, x2: width, y1: at, y2: at } : { x1: at, x2: at, y1: 0, y2: tall };
        for (const [name, value] of Object.entries(ends)) line.setAttribute(name, value);
      }
    };
    const show = () => {
      for (const layer of all("[data-class]", svg)) {
        const kind = layer.dataset.kind ?? (layer.classList.contains("truth") ? "truth" : "prediction");
        const on = scope.querySelector(`input[data-kind=${kind}]`).checked;
        layer.toggleAttribute("hidden", !on || layer.dataset.class !== choice.value);
      }
    };
    slider.addEventListener("input", move);
    for (const control of all("select, input[type=checkbox]", scope)) control.addEventListener("change", show);
    if (ortho) {
      svg.addEventListener("click", (event) => {
        const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
        const [rows, columns] = [0, 1, 2].filter((axis) => String(axis) !== viewer.dataset.axis);
        const place = { [rows]: point.y - slider.value * height, [columns]: point.x };
        for (const [axis, offset] of Object.entries(place)) {
          const other = ortho.querySelector(`.viewer[data-axis="${axis}"]`);
          const knob = other.querySelector(".z");
          knob.value = nearest(numbers(other.dataset.offsets), offset);
          knob.dispatchEvent(new Event("input"));
        }
      });
    }
    move();
    show();
  }

  // a row of the table of objects shows its slices in the crop's viewer
  for (const button of all("[data-at]")) {
    button.addEventListener("click", () => {
      const ortho = button.closest(".crop").querySelector(".ortho");
      const choice = ortho.querySelector("select");
      choice.value = button.dataset.class;
      choice.dispatchEvent(new Event("change"));
      numbers(button.dataset.at).forEach((at, axis) => {
        const pane = ortho.querySelector(`.viewer[data-axis="${axis}"]`);
        const knob = pane.querySelector(".z");
        knob.value = nearest(numbers(pane.dataset.z), at);
        knob.dispatchEvent(new Event("input"));
      });
      ortho.scrollIntoView({ block: "center" });
      for (const other of all("tr.shown")) other.classList.remove("shown");
      button.closest("tr").classList.add("shown");
    });
  }
})();
