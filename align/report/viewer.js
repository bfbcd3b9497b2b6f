// Every sample is a button that shows it large in a dialog; the arrow keys go on to the others, Escape closes.
(() => {
  const viewer = document.getElementById("viewer");
  const stage = viewer.querySelector(".stage");
  const caption = viewer.querySelector("figcaption");
  const buttons = [...document.querySelectorAll("main img")].map((image) => {
    const shown = image.closest("picture") || image;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "zoom";
    button.setAttribute("aria-label", `Enlarge: ${image.alt}`);
    shown.replaceWith(button);
    button.append(shown);
    button.addEventListener("click", () => open(button));
    return button;
  });
  let shown = [];
  let at = 0;

  const draw = () => {
    const copy = shown[at].firstElementChild.cloneNode(true);
    const image = copy.querySelector("img") || copy;
    const { width, height } = image;
    // a photograph is not enlarged beyond three times its pixels, pixel art as far as the window allows
    image.style.width = `min(${image.classList.contains("crisp") ? "100%" : `${3 * width}px`}, 100%, ${(76 * width) / height}vh)`;
    stage.replaceChildren(copy);
    caption.textContent = `${image.alt} (${at + 1} of ${shown.length})`;
  };
  const go = (steps) => {
    at = (at + steps + shown.length) % shown.length;
    draw();
  };
  const open = (button) => {
    shown = buttons.filter((one) => one === button || !one.checkVisibility || one.checkVisibility());
    at = shown.indexOf(button);
    draw();
    viewer.showModal();
  };

  viewer.querySelector(".back").addEventListener("click", () => go(-1));
  viewer.querySelector(".on").addEventListener("click", () => go(1));
  viewer.querySelector(".shut").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("close", () => shown[at].focus());
  viewer.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!steps) return;
    event.preventDefault();
    go(steps);
  });
})();
