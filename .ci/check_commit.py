#!/usr/bin/env python3
"""Checks commit messages: `check_commit.py FILE` checks one that is being written, without FILE those of the history.

A subject is an imperative of at most 72 characters that a stranger understands; a commit of more than a few lines says
why in its body, unless it only moves them. The rule holds from the commit with the subject FIRST on: older
commits were written without it.
"""

import re
import subprocess
import sys
from pathlib import Path

FIRST = "Move the configs into a folder of their own"
SUBJECT_LENGTH = 72
LINES_WITHOUT_BODY = 60  # added and removed lines up to which a subject may be enough

MOVES = {"Move", "Rename"}  # a subject that begins so says it all

NO_VERBS = {"a", "an", "the", "this", "these", "it", "its", "no", "new", "now", "more", "some", "also", "when", "for"}
PAST_TENSES = {"made", "built", "wrote", "ran", "took", "gave", "got", "went", "kept", "left", "sent", "found", "did"}
# Imperatives that end like a past tense, a gerund or a third person.
IMPERATIVES = {"embed", "exceed", "feed", "need", "proceed", "seed", "shed", "speed", "bring", "ring", "alias", "focus"}


def complaints(message: str, changed_lines: int) -> list[str]:
    """What is wrong with a commit message: nothing, for a good one.

    message: without comments. changed_lines: how many lines the commit adds and removes.
    """
    subject, _, rest = message.strip().partition("\n")
    if re.match(r'Revert "|Merge ', subject):  # git's own words
        return []
    found = []
    if len(subject) > SUBJECT_LENGTH:
        found.append(f"the subject has {len(subject)} characters, at most {SUBJECT_LENGTH} are allowed")
    if subject.endswith("."):
        found.append("the subject ends with a period")
    word = re.split(r"[ :,]", subject, maxsplit=1)[0]
    if re.match(r"\S+(, \S+)*: ", subject):
        found.append(f"the subject begins with an area, {word!r}; write an imperative that says where")
    elif not word[:1].isupper():
        found.append("the subject does not begin with a capital letter")
    elif not is_imperative(word.lower()):
        found.append(f"the subject begins with {word!r}, which is no imperative; Add, Fix, Read, ... are")
    if rest and not rest.startswith("\n"):
        found.append("there is no blank line between subject and body")
    body = [line for line in rest.splitlines() if line.strip() and not re.match(r"[A-Z][\w-]+-by: ", line)]
    if not body and changed_lines > LINES_WITHOUT_BODY and word not in MOVES:
        found.append(f"{changed_lines} lines change: say why in a body, below a blank line")
    return found


def is_imperative(word: str) -> bool:
    """As far as a script can tell: neither an article or noun marker nor another form of a verb."""
    other_form = word.endswith(("ed", "ing")) or (word.endswith("s") and not word.endswith("ss"))
    return word in IMPERATIVES or not (other_form or word in NO_VERBS or word in PAST_TENSES)


def git(*arguments: str, stdin: str = "") -> str:
    """What a git command prints. Raises CalledProcessError where git refuses."""
    done = subprocess.run(["git", *arguments], input=stdin, stdout=subprocess.PIPE, check=True, encoding="utf-8")
    return done.stdout


def changed_lines(numstat: str) -> int:
    """The lines added and removed, by the output of `--numstat`; binary files count nothing."""
    rows = re.findall(r"^(\d+)\t(\d+)\t", numstat, re.MULTILINE)
    return sum(int(added) + int(removed) for added, removed in rows)


def check_file(path: Path) -> int:
    """As the commit-msg hook: a message in a file, and the staged changes."""
    written = path.read_text("utf-8").partition("# ------------------------ >8 ------------------------")[0]
    message = git("stripspace", "--strip-comments", stdin=written)
    if re.match(r"(fixup|squash|amend)! ", message):  # melted into another commit before anyone else sees it
        return 0
    found = complaints(message, changed_lines(git("diff", "--cached", "--numstat", "-M")))
    for complaint in found:
        print(f"commit message: {complaint}", file=sys.stderr)
    return 1 if found else 0


def check_history() -> int:
    """Every commit since the rule, wherever the history can be read."""
    try:
        shallow = git("rev-parse", "--is-shallow-repository").strip() == "true"
    except (FileNotFoundError, subprocess.CalledProcessError):
        print("commit messages: not checked, git is missing or this is no clone")
        return 0
    if shallow:
        print("commit messages: not checked, this is a shallow clone")
        return 0
    first = git("log", "-1", "--format=%H", f"--grep=^{FIRST}$", "HEAD").strip()
    if not first:
        print("commit messages: not checked, this history does not hold the commit since which they are")
        return 0
    commits = git("rev-list", "--no-merges", "--reverse", f"{first}..HEAD").split()
    bad = 0
    for commit in commits:
        message = git("show", "--no-patch", "--format=%B", commit)
        found = complaints(message, changed_lines(git("show", "--format=", "--numstat", "-M", commit)))
        if found:
            bad += 1
            print(commit[:9], message.splitlines()[0], file=sys.stderr)
        for complaint in found:
            print(f"    {complaint}", file=sys.stderr)
    print(f"commit messages: {len(commits)} checked, {bad} to reword")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(check_file(Path(sys.argv[1])) if len(sys.argv) > 1 else check_history())
