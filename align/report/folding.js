// Secondary parts of a page are folded on a narrow screen, open on a wide one and in print.
(() => {
  const narrow = matchMedia("screen and (max-width: 620px)");
  const folds = [...document.querySelectorAll("details.folded, details.more")];
  const fold = () => folds.forEach((part) => (part.open = !narrow.matches));
  fold();
  narrow.addEventListener("change", fold);

  let before = [];
  addEventListener("beforeprint", () => {
    before = folds.map((part) => part.open);
    folds.forEach((part) => (part.open = true));
  });
  addEventListener("afterprint", () => folds.forEach((part, i) => (part.open = before[i])));
})();
