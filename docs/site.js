// Console sessions: commands stand out, and the lines of each terminal have a tint of their own. The lines
// `# terminal N` are only hidden from sight: a screen reader and the copy button still have them.
for (const code of document.querySelectorAll("pre > code.language-console")) {
    const lines = code.textContent.trimEnd().split("\n");
    const session = document.createElement("span");
    session.className = "session";
    let part = null;
    let previous = "";
    let isCommand = false;
    for (const line of lines) {
        const mark = line.match(/^# terminal (\d+)$/);
        // After a backslash a command goes on in the next line.
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
