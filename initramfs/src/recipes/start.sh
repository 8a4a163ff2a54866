#!/bin/sh
# Runs the program that the kernel's command line names as vmfork.start=PROGRAM,ARGUMENT,ARGUMENT... on the
# console.
set -f
read -r cmdline </proc/cmdline
start=/bin/sh
for word in $cmdline; do
    case $word in
        vmfork.start=*) start=${word#vmfork.start=} ;;
    esac
done
IFS=,
set -- $start
unset IFS

# The program is in a session with the console as its terminal, so that Ctrl-C reaches it. The kernel throws
# away unsent output when a session's leader ends, so the leader waits for it: stty does.
setsid -c sh -c '"$@"; status=$?; stty echo; exit $status' sh "$@" </dev/console >/dev/console 2>&1
status=$?
if [ $status -ne 0 ]; then
    echo "guest: $1 ended with $status"
fi
