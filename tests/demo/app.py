"""A small service that completes phrases: it loads for seconds, forks its VM, and each copy answers from what was loaded.

Usage: app.py CHILDREN. It prints READY when it is warm, and in each child ANSWER with a JSON object.
"""

import gc
import json
import os
import re
import sqlite3
import subprocess
import sys
import time

TEXTS = "/usr/share/common-licenses"

# Phrases of up to so many words can be completed.
LONGEST = 16

# Which phrase a child completes: its index says, counted round.
PHRASES = ["you may not", "source", "the terms", "under the terms of"]

QUERY = "SELECT next, n FROM completions WHERE phrase = ? ORDER BY n DESC, next LIMIT 5"


def phrases(words):
    """Every phrase, with the word that follows it."""
    for length in range(1, LONGEST + 1):
        for start in range(len(words) - length):
            yield " ".join(words[start : start + length]), words[start + length]


def load():
    """Counts how often each word follows each phrase of every text, in a database in memory."""
    database = sqlite3.connect(":memory:")
    database.execute("CREATE TABLE phrases (phrase TEXT, next TEXT)")
    for name in sorted(os.listdir(TEXTS)):
        path = os.path.join(TEXTS, name)
        if os.path.islink(path):
            continue
        with open(path, encoding="latin-1") as text:
            words = re.findall("[a-z]+", text.read().lower())
        database.executemany("INSERT INTO phrases VALUES (?, ?)", phrases(words))
    database.execute(
        "CREATE TABLE completions (phrase TEXT, n INTEGER, next TEXT, PRIMARY KEY (phrase, n DESC, next)) WITHOUT ROWID"
    )
    database.execute("INSERT INTO completions SELECT phrase, count(*), next FROM phrases GROUP BY phrase, next")
    database.execute("DROP TABLE phrases")
    return database


def main():
    children = sys.argv[1]
    started = time.monotonic()
    database = load()
    count = database.execute("SELECT count(*) FROM completions").fetchone()[0]
    ready = {"completions": count, "load_s": round(time.monotonic() - started, 3)}
    print("READY", json.dumps(ready), flush=True)

    # What was loaded stays: the garbage collector need not look at it again, which would write to all of it, in every copy.
    gc.freeze()
    command = ["vmfork", "fork", "--count", children, "--type", "web", "--json"]
    forked = json.loads(subprocess.run(command, stdout=subprocess.PIPE).stdout)
    if "error" in forked:
        print("FAILED", json.dumps(forked), flush=True)
        return 1
    if forked["role"] == "child":
        phrase = PHRASES[forked["index"] % len(PHRASES)]
        answer = database.execute(QUERY, [phrase]).fetchall()
        print("ANSWER", json.dumps({"index": forked["index"], "phrase": phrase, "next": answer}), flush=True)
    # Whoever runs the demo looks at the VMs now, and ends them.
    time.sleep(3600)
    return 0


if __name__ == "__main__":
    sys.exit(main())
