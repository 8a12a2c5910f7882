// What scrolls sideways can be reached, and scrolled, from the keyboard.
const sideways = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
document.addEventListener("DOMContentLoaded", () => {
  const boxes = "article pre, article .table-wrapper, article .math-wrapper";
  document.querySelectorAll(boxes).forEach((box) => sideways.observe(box));
});
