# What the scripts of contrib/ share. Sourced by bash, never run.
# shellcheck shell=bash

criu_prefix=/usr/local/lib/krgfs/criu
criu_least=4.2

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "this installs packages and talks to the kernel; run it as root"; }

# Print the first line of a command that may write no line at all, or fail.
first_line() { local line=; IFS= read -r line < <("$@" 2>/dev/null) || true; printf '%s\n' "$line"; }

# One set-up at a time on this machine, from whichever clone it comes: apt's own locks do not
# cover its lists. Lasts until the shell ends or `unlock_setup`; a second call in a child that
# inherited the lock is harmless.
lock_setup() {
    [ -z "${KRGFS_SETUP_LOCKED:-}" ] || return 0
    exec 9>/run/lock/krgfs-setup.lock
    flock --nonblock 9 || { say "another set-up is under way on this machine; waiting for it"; flock 9; }
    export KRGFS_SETUP_LOCKED=1
}
unlock_setup() {
    unset KRGFS_SETUP_LOCKED
    exec 9>&-
}

# Names of those packages among the arguments that dpkg does not have.
missing_packages() {
    local package
    for package; do
        [[ $(first_line dpkg-query -W -f '${db:Status-Status}\n' "$package") == installed ]] ||
            printf '%s\n' "$package"
    done
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=600 "$@" </dev/null 9>&-; }

# Install what is missing of the packages named, and touch nothing else; asks no mirror when
# everything is there. A daemon that a package brings is not started: RUNLEVEL=1 tells the
# maintainer scripts' invoke-rc.d and deb-systemd-invoke that the machine is in single-user mode.
install_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "missing: ${missing[*]}; there is no apt-get here to install them with"
    need_root
    lock_setup
    say "installing ${missing[*]}"
    apt_get update >/dev/null
    RUNLEVEL=1 apt_get install --no-install-recommends "${missing[@]}" >/dev/null
}

# Is version $1 at least $2, as Debian compares them?
at_least() { dpkg --compare-versions "$1" ge "$2"; }
