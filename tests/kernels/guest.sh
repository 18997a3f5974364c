#!/bin/sh
# Runs as root in the guest: gives it what a booted machine has, runs the command, leaves its output and exit status in
# the folder shared with the host. The root file system is the host's, read-only.
shared=$1
tree=$2
exec >"$shared/output" 2>&1 </dev/null

mounted() { grep -q " $1 " /proc/mounts; }
mounted /sys/fs/cgroup || mount -t cgroup2 cgroup2 /sys/fs/cgroup
mounted /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
mounted /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
mkdir -p /run/netns /run/lock /run/newtmp

# A writable /tmp, in which a tree that lives there stays.
mount -t tmpfs -o mode=1777 tmpfs /run/newtmp
case $tree in /tmp/*)
	mkdir -p "/run/newtmp${tree#/tmp}"
	mount --rbind "$tree" "/run/newtmp${tree#/tmp}" ;;
esac
mount --move /run/newtmp /tmp
mkdir -p /tmp/home

# The package is installed for this guest; the editable install would only cost each start of Python 0.7 s.
for hook in "$tree"/.venv/lib/python3*/site-packages/tcpscope-editable.pth; do
	mount --bind /dev/null "$hook"
done

export TCPSCOPE_GUEST=1 # nobody else uses TCP here
ip link set lo up
ulimit -n 65536

export HOME=/tmp/home TMPDIR=/tmp LANG=C.UTF-8
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis

cut -d ' ' -f 1 /proc/uptime >"$shared/booted"
sh "$shared/command"
echo $? >"$shared/status.new"
mv "$shared/status.new" "$shared/status"
