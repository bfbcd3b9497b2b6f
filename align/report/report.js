// Hovering a chart shows the row of its table nearest to the pointer, on every chart of the card; code can be copied.
"use strict";
(() => {
  const tip = document.getElementById("tip");
  const parse = (text) => Number(text.replace(/,/g, "").replace("−", "-"));

  for (const card of document.querySelectorAll("figure.card")) {
    const charts = [...card.querySelectorAll("svg")];
    const names = [...card.querySelectorAll("thead th")].map((cell) => cell.textContent);
    const rows = [...card.querySelectorAll("tbody tr")].map((row) => [...row.cells].map((cell) => cell.textContent));
    const steps = rows.map((row) => parse(row[0]));

    const place = (chart, step) => {
      const { left, right, min, max } = chart.dataset;
      return Number(left) + ((step - min) / (max - min)) * (right - left);
    };

    const show = (chart, event) => {
      const box = chart.getBoundingClientRect();
      const at = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      let best = 0;
      steps.forEach((step, i) => {
        if (Math.abs(place(chart, step) - at) < Math.abs(place(chart, steps[best]) - at)) best = i;
      });
      for (const other of charts) {
        const cursor = other.querySelector(".cursor");
        cursor.setAttribute("x1", place(other, steps[best]));
        cursor.setAttribute("x2", place(other, steps[best]));
        cursor.classList.add("on");
      }
      tip.replaceChildren();
      names.forEach((name, i) => {
        if (rows[best][i] === "–") return;
        const line = tip.appendChild(document.createElement("div"));
        line.append(name + " ");
        line.appendChild(document.createElement("b")).textContent = rows[best][i];
      });
      tip.hidden = false;
      const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = Math.max(8, Math.min(event.clientX + 14, room)) + "px";
      tip.style.top = Math.max(8, event.clientY - tip.offsetHeight - 12) + "px";
    };

    const hide = () => {
      tip.hidden = true;
      for (const chart of charts) chart.querySelector(".cursor").classList.remove("on");
    };

    if (!rows.length) continue;
    for (const chart of charts) {
      chart.addEventListener("pointermove", (event) => show(chart, event));
      chart.addEventListener("pointerleave", hide);
    }
  }

  for (const button of document.querySelectorAll("button.copy")) {
    const text = button.parentElement.querySelector("pre");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
      } catch {
        // pages opened from a file may not write to the clipboard in every browser
        const range = document.createRange();
        range.selectNodeContents(text);
        getSelection().removeAllRanges();
        getSelection().addRange(range);
        if (!document.execCommand("copy")) return;
      }
      button.textContent = "Copied";
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
})();
