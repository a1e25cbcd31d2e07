# What the scripts of contrib/ share. Sourced by bash under `set -euo pipefail`, never run.
# shellcheck shell=bash

criu_prefix=/usr/local/lib/krgfs/criu
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
top=$(dirname "$here")

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# Print the comment that a script begins with, as its help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

need_root() { [ "$(id -u)" = 0 ] || die "this installs packages and talks to the kernel; run it as root"; }

# Run the rest of the arguments until they succeed, for at most $1 seconds.
wait_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.05
    done
}

# Is no process, not even a zombie, left with this pid?
is_gone() { [ ! -e "/proc/$1" ]; }

# End a process by its pid and wait until the pid is free. A zombie holds it too, and some init
# processes reap late.
end_process() {
    kill -KILL "$1" 2>/dev/null || true
    wait_until 60 is_gone "$1"
}

# Start a program of ours in a session of its own, output appended to $1, with no descriptor that
# somebody left open; its pid is then in $detached_pid. It is our child, so its pid is free as soon
# as it has ended.
detached() {
    local output=$1
    shift
    (
        for fd in /proc/"$BASHPID"/fd/*; do
            fd=${fd##*/}
            [ "$fd" -le 2 ] || eval "exec $fd>&-"
        done
        exec setsid "$@"
    ) </dev/null >>"$output" 2>&1 &
    detached_pid=$!
    disown "$detached_pid"
}

# --- set-up: packages, CRIU, the Python environment

# One set-up at a time on this machine, from whichever clone it comes: apt's own locks do not
# cover its lists. Lasts until the shell ends or `unlock_setup`. A script that ours starts meanwhile
# finds it taken on its behalf.
lock_setup() {
    [ -z "${KRGFS_SETUP_LOCKED:-}" ] || return 0
    need_root
    mkdir -p /run/lock
    exec 9>/run/lock/krgfs-setup.lock
    flock --nonblock 9 || { say "another set-up is under way on this machine; waiting for it"; flock 9; }
    export KRGFS_SETUP_LOCKED=1
}
unlock_setup() {
    unset KRGFS_SETUP_LOCKED
    exec 9>&-
}

# Print those packages among the arguments that are not installed.
missing_packages() {
    local package
    for package; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] ||
            printf '%s\n' "$package"
    done
}

apt_get() {
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 "$@" </dev/null 9>&-
}

# Install what is missing of the packages named, and touch nothing else; asks no mirror when
# everything is there.
install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "this needs ${missing[*]}, and there is no apt-get to install them with"
    lock_setup
    say "installing ${missing[*]}"
    quietly apt_get update || die "apt-get update failed: its words stand above"
    # RUNLEVEL=1: under sysvinit, daemons that come with a package are not started
    RUNLEVEL=1 quietly apt_get install --no-install-recommends "${missing[@]}" ||
        die "apt-get could not install ${missing[*]}: its words stand above"
    stop_services "${missing[@]}"
}

# Under systemd a package starts its daemon as it is installed. We want the program only; a daemon
# that was there before is in none of these packages.
stop_services() {
    local unit
    [ -d /run/systemd/system ] || return 0
    dpkg-query -L "$@" | sed -n 's|.*/systemd/system/\([^/@]*\.service\)$|\1|p' | sort -u |
        while read -r unit; do
            ! systemctl --quiet is-active "$unit" || systemctl --quiet disable --now "$unit" </dev/null
        done
}

# Run a command and show what it said only if it fails.
quietly() {
    local said
    said=$("$@" 2>&1) || { printf '%s\n' "$said" >&2; return 1; }
}

# Choose a CRIU that has dumped and restored a process here; its path is then in $criu. One that
# is installed comes first, then the distribution's package if it is new enough for the kernels
# of today, then one fetched beside the system.
choose_criu() {
    local candidate
    for criu in "${KRG_CRIU:-}" "$(command -v criu || true)" "$criu_prefix/usr/sbin/criu"; do
        [ -x "$criu" ] && "$here/criu-works" "$criu" >/dev/null 2>&1 && return 0
    done
    need_root
    candidate=$(LC_ALL=C apt-cache policy criu 2>/dev/null | sed -n 's/^  Candidate: //p')
    if [ "${candidate:-(none)}" != '(none)' ] && dpkg --compare-versions "$candidate" ge 4.2; then
        install_packages criu
        criu=$(command -v criu || true)
        [ -x "$criu" ] && "$here/criu-works" "$criu" >/dev/null 2>&1 && return 0
    fi
    criu=$("$here/fetch-criu") || die "no CRIU that works here; contrib/fetch-criu said why"
    "$here/criu-works" "$criu" || die "no process can be dumped and restored here"
}

# A Python for .venv is then in $python: the distribution's if it fits, else the one on PATH.
choose_python() {
    # the distribution's first: one below /root is closed to other users, who then cannot run krg
    for python in /usr/bin/python3 python3; do
        python_fits "$python" && return 0
    done
    install_packages python3 python3-venv python3-dev
    python=/usr/bin/python3
    python_fits "$python" || die "krgfs needs Python 3.11 or later, and $("$python" --version) is all there is"
}

# Is $1 a Python of 3.11 or later that can make an environment and compile an extension?
python_fits() {
    "$1" - <<'END' 2>/dev/null
import ensurepip, os, sys, sysconfig, venv
sys.exit(sys.version_info < (3, 11) or not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
END
}

# Print what the installed environment depends on, as one digest.
environment_digest() {
    { cat "$top"/{pyproject.toml,setup.py} "$top"/agent/*.[ch] 2>/dev/null || true; echo "$top $*"; } |
        sha256sum | cut -d ' ' -f 1
}

# Is .venv what `make_environment $1` would make?
environment_fits() {
    [ -x "$top/.venv/bin/python" ] && "$top/.venv/bin/python" -c '' 2>/dev/null &&
        grep -qsx "$(environment_digest "$1")" "$top/.venv/krgfs-stamp$1"
}

# Make .venv by $python and install this tree in it, with the extra $1 if given: '' or '[test]'.
make_environment() {
    environment_fits "$1" && return 0
    lock_setup
    # of what we depend on, only pyfuse3 and our keeper have to be compiled
    install_packages gcc libc6-dev pkg-config libfuse3-dev
    # an environment that was moved or copied here still runs the programs of the other place
    [[ $("$top/.venv/bin/pip" --version 2>/dev/null) == *" $top/.venv/"* ]] ||
        "$python" -m venv --clear "$top/.venv"
    say "installing krgfs$1 into $top/.venv"
    quietly "$top/.venv/bin/pip" install --disable-pip-version-check -e "$top$1" 9>&- ||
        die "pip could not install krgfs: its words stand above"
    environment_digest "$1" >"$top/.venv/krgfs-stamp$1"
}

# All that krgfs needs to run from this tree, with the extra $1.
set_up() {
    install_packages fuse3 nftables iproute2 procps
    choose_python
    choose_criu
    make_environment "$1"
    unlock_setup
}
