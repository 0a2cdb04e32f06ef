"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const opacity = document.getElementById("opacity");
  if (opacity) {
    const set = () => document.documentElement.style.setProperty("--ov", opacity.value / 100);
    opacity.addEventListener("input", set);
    set();
  }
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

  for (const viewer of all(".viewer")) {
    const slider = viewer.querySelector(".z");
    const svg = viewer.querySelector("svg");
    const choice = viewer.querySelector("select");
    const positions = viewer.dataset.z.split(",");
    const height = Number(viewer.dataset.height);
    const move = () => {
      const top = slider.value * height;
      svg.setAttribute("viewBox", `0 ${top} ${viewer.dataset.width} ${height}`);
      viewer.querySelector(".fixed").setAttribute("transform", `translate(0 ${top})`);
      viewer.querySelector("output").textContent = `z = ${positions[slider.value]} nm`;
    };
    const show = () => {
      for (const layer of all("[data-class]", svg)) {
        const kind = layer.dataset.kind ?? (layer.classList.contains("truth") ? "truth" : "prediction");
        const on = viewer.querySelector(`input[data-kind=${kind}]`).checked;
        layer.toggleAttribute("hidden", !on || layer.dataset.class !== choice.value);
      }
    };
    slider.addEventListener("input", move);
    for (const control of all("select, input[type=checkbox]", viewer)) control.addEventListener("change", show);
    move();
    show();
  }
})();
