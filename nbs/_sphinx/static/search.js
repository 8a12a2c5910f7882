// Sphinx shows what it finds with the text around it, in which equations would be TeX:
// a plain one, such as z_t, is shown as it is, and any other as an ellipsis.
document.addEventListener("DOMContentLoaded", () => {
  const htmlToText = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    for (const equation of page.querySelectorAll(".math")) {
      const tex = equation.textContent.replace(/^\s*\\[([]|\\[)\]]\s*$/g, "").trim();
      equation.textContent = /[\\{]/.test(tex) ? "…" : tex;
    }
    return htmlToText(page.documentElement.outerHTML, anchor);
  };
});
