// Pictures: inlines each SVG, so that the theme's colours apply to it. If that fails, for example in a book that
// was opened as a file, the image stays and uses its own colours.
(async () => {
    for (const image of document.querySelectorAll('.content img[src$=".svg"]')) {
        try {
            const response = await fetch(image.src);
            if (!response.ok) throw new Error(`status ${response.status}`);
            const parsed = new DOMParser().parseFromString(await response.text(), "image/svg+xml");
            const picture = document.importNode(parsed.documentElement, true);
            const broken = !(picture instanceof SVGSVGElement) || picture.querySelector("parsererror");
            if (broken) throw new Error("no SVG");
            picture.classList.add("picture");
            // The image's text takes the place of the title, which would pop up under the mouse.
            picture.setAttribute("aria-label", image.alt);
            picture.setAttribute("aria-describedby", `${picture.id}-desc`);
            picture.removeAttribute("aria-labelledby");
            picture.querySelector("title")?.remove();
            image.replaceWith(picture);
        } catch (error) {
            console.warn(`${image.src} is not inlined: ${error.message}`);
        }
    }
})();

// Console sessions: commands stand out, and the lines of each terminal have a tint of their own. The lines
// `# terminal N` are only hidden visually: screen readers and the copy button still get them.
for (const code of document.querySelectorAll("pre > code.language-console")) {
    const lines = code.textContent.trimEnd().split("\n");
    const session = document.createElement("span");
    session.className = "session";
    let part = null;
    let previous = "";
    let isCommand = false;
    for (const line of lines) {
        const mark = line.match(/^# terminal (\d+)$/);
        // After a backslash, a command continues on the next line.
        isCommand = line.startsWith("$ ") || line === "^C" || (isCommand && previous.endsWith("\\"));
        previous = line;
        if (mark || !part) {
            part = document.createElement("span");
            session.append(part);
        }
        if (mark) {
            part.dataset.terminal = mark[1];
            part.title = `terminal ${mark[1]}`;
        }
        const element = document.createElement(isCommand ? "b" : "span");
        element.className = mark ? "mark" : "";
        element.textContent = line;
        part.append(element);
    }
    code.replaceChildren(session);
}

// Tables of words: on a narrow screen each cell stands alone, so it needs the title of its column.
for (const table of document.querySelectorAll(".content table:not(.replay *)")) {
    const titles = [...table.querySelectorAll("th")].map(title => title.textContent);
    if (titles.length < 3) continue;
    for (const row of table.querySelectorAll("tbody tr"))
        [...row.cells].forEach((cell, column) => { cell.dataset.title = titles[column]; });
}
