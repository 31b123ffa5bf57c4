"use strict";

// Rows by one column: numbers and texts upwards, then downwards; missing ones last both ways.
function key(row, column, kind) {
  const cell = row.cells[column];
  const text = cell.tagName === "TH" ? cell.textContent : cell.dataset.value;
  return text === undefined || kind === "text" ? text : Number(text);
}

function sort(head) {
  const table = head.closest("table");
  const body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const rows = Array.from(body.rows, (row) => [key(row, head.cellIndex, head.dataset.kind), row]);
  rows.sort(([one], [other]) => {
    if (one === undefined || other === undefined) {
      return (one === undefined) - (other === undefined);
    }
    const order = (one > other) - (one < other);
    return down ? -order : order;
  });
  for (const each of table.tHead.querySelectorAll("th")) {
    each.removeAttribute("aria-sort");
  }
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...rows.map(([, row]) => row));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}

// The older call, since a file's page has no clipboard of its own in every browser.
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    button.parentElement.querySelector("textarea").select();
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
  });
}

document.documentElement.classList.add("scripted");
