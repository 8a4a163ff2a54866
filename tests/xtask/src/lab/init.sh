#!/bin/sh
# First process of the lab. The kernel's console is the first serial port. The command has the second as its
# terminal; the third tells when it can take input, and how it ended.
mount -t devtmpfs dev /dev
mkdir /dev/pts /dev/shm
mount -a
echo lab >/proc/sys/kernel/hostname
export PATH=/lab/bin:/usr/sbin:/usr/bin HOME=/root TERM=dumb VMFORK_ASSETS=/lab/assets VMFORK_LAB=1
# Where it can't enter a guest, it says what was wrong with it.
modprobe kvm-amd dump_invalid_vmcb=1
ip link set lo up
cd /root

# Open from here on: closing the terminal would throw away its input.
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo
echo ready >/dev/ttyS2
# The kernel throws away unsent output when a session's leader ends, so the leader waits for it: stty does.
setsid -c sh -c 'sh /lab/command; status=$?; stty -echo; exit $status' <&3 >&3 2>&3
echo $? >/dev/ttyS2
poweroff -f
