#!/usr/bin/env bash
# Makes a Debian 12 that starts by UEFI (debian-uefi.toml) and by measured direct boot (snp-measured.toml).
#
#   sudo ./debian-disk.sh FOLDER [TREE…]
#
# FOLDER is made, and must not be there: debian.raw is the disk (a sparse raw image: GPT, an EFI system partition with
# systemd-boot, an ext4 root file system made by debootstrap), vmlinuz and initrd.img are its kernel and initramfs once
# more, for owners who measure them. Each TREE is copied over the root file system: keys, configuration, units. A service
# in its etc/systemd/system that says what wants it is enabled.
#
# From the environment:
#   MIRROR    where packages come from              http://deb.debian.org/debian
#   KERNEL    the kernel's package                  linux-image-amd64. linux-image-cloud-amd64 is smaller, and has no
#                                                   driver for the watchdog
#   PACKAGES  more packages, separated by commas
#   SIZE_MIB  the disk's size                       1536
#   PASSWORD  root's password; without it, nobody can log in
#
# On Debian: apt-get install debootstrap dosfstools e2fsprogs fdisk mtools
# A kernel that is installed in the guest later is not put on the EFI system partition: do that as here.
set -euo pipefail

readonly SUITE=bookworm ESP_MIB=96 LABEL=debian
readonly TOOLS=(debootstrap mkfs.fat mke2fs sfdisk mtools)
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"

fail() {
    echo "debian-disk: $*" >&2
    exit 1
}

# In namespaces of its own: whatever debootstrap mounts, or leaves running, ends with this script.
if [ -z "${DEBIAN_DISK_INSIDE:-}" ]; then
    [ $# -ge 1 ] || fail "usage: debian-disk.sh FOLDER [TREE…]"
    [ "$(id -u)" = 0 ] || fail "needs root: debootstrap makes devices and uses chroot"
    for tool in "${TOOLS[@]}"; do
        command -v "$tool" >/dev/null ||
            fail "there is no $tool: apt-get install debootstrap dosfstools e2fsprogs fdisk mtools"
    done
    DEBIAN_DISK_INSIDE=1 exec unshare --mount --pid --fork --kill-child --mount-proc \
        timeout --foreground --kill-after=10 1800 "$BASH" "$0" "$@"
fi

out=$1
shift
trees=("$@")
[ ! -e "$out" ] || fail "$out is there already"
for tree in "${trees[@]}"; do
    [ -d "$tree" ] || fail "$tree is no folder"
done
MIRROR=${MIRROR:-http://deb.debian.org/debian}
size=${SIZE_MIB:-1536}
[[ $size =~ ^[0-9]{4,6}$ ]] || fail "SIZE_MIB=$size: give 1000 to 999999"

# The folder gets its name last, when everything is in it.
work=$(mktemp --directory "$(dirname "$out")/.debian-disk.XXXXXX")
trap 'rm -rf --one-file-system "$work"' EXIT
root=$work/root
made=$work/made
mkdir "$root" "$made"

write() { # PATH, the text from stdin
    mkdir -p "$root/$(dirname "$1")"
    cat >"$root/$1"
}

# What dpkg shall leave out, and what the initramfs shall have in it, must be known before packages are unpacked.
write etc/dpkg/dpkg.cfg.d/small <<'END'
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
path-exclude=/lib/modules/*/kernel/drivers/comedi/*
path-exclude=/lib/modules/*/kernel/drivers/gpu/*
path-exclude=/lib/modules/*/kernel/drivers/iio/*
path-exclude=/lib/modules/*/kernel/drivers/infiniband/*
path-exclude=/lib/modules/*/kernel/drivers/media/*
path-exclude=/lib/modules/*/kernel/drivers/net/ethernet/*
path-exclude=/lib/modules/*/kernel/drivers/net/wireless/*
path-exclude=/lib/modules/*/kernel/drivers/staging/*
path-exclude=/lib/modules/*/kernel/sound/*
END
write etc/dpkg/dpkg.cfg.d/unsafe <<<force-unsafe-io
write etc/initramfs-tools/conf.d/modules <<<MODULES=list
# The console before systemd looks for terminals to log in on.
printf '%s\n' virtio_pci virtio_blk virtio_console ext4 crc32c_generic | write usr/share/initramfs-tools/modules.d/casemate

include=dbus,initramfs-tools,iproute2,iputils-ping,socat,systemd-boot-efi,systemd-sysv,udev,zstd
include+=,${KERNEL:-linux-image-amd64}${PACKAGES:+,$PACKAGES}
debootstrap --force-check-gpg --variant=minbase --include="$include" "$SUITE" "$root" \
    "$MIRROR" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    [ ! -e "$root/debootstrap/debootstrap.log" ] || tail -n 20 "$root/debootstrap/debootstrap.log" >&2
    fail "debootstrap failed"
}

write etc/fstab <<<"LABEL=$LABEL / ext4 errors=remount-ro,discard 0 1"
write etc/hostname <<<debian
write etc/apt/sources.list <<END
deb $MIRROR $SUITE main
deb $MIRROR $SUITE-updates main
deb http://deb.debian.org/debian-security $SUITE-security main
END
# Empty: each guest makes its own when it first starts.
: >"$root/etc/machine-id"
# Work that a guest does not need at its start; `systemctl unmask` brings it back.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
    fstrim.timer getty@tty1.service systemd-pstore.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
[ -z "${PASSWORD:-}" ] || chroot "$root" chpasswd <<<"root:$PASSWORD"
for tree in "${trees[@]}"; do
    cp -r --preserve=mode,links --no-dereference "$tree/." "$root/"
    for unit in "$tree"/etc/systemd/system/*.service; do
        if grep -qs '^WantedBy=' "$unit"; then
            chroot "$root" systemctl --quiet enable "$(basename "$unit")"
        fi
    done
done
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,info,locale,man}/* \
    "$root"/etc/dpkg/dpkg.cfg.d/unsafe "$root"/etc/resolv.conf "$root"/var/log/*.log

kernel=$(echo "$root"/boot/vmlinuz-*)
initrd=${kernel/vmlinuz-/initrd.img-}
[ -f "$kernel" ] && [ -f "$initrd" ] || fail "there must be one kernel with an initramfs in /boot: $kernel, $initrd"
cp "$kernel" "$made/vmlinuz"
cp "$initrd" "$made/initrd.img"

disk=$made/debian.raw
truncate --size="${size}M" "$disk"
sfdisk --quiet "$disk" <<END
label: gpt
start=1MiB, size=${ESP_MIB}MiB, type=uefi, name=ESP
size=$((size - ESP_MIB - 2))MiB, type=linux, name=$LABEL
END

mkfs.fat -F 32 -s 1 -n ESP --offset 2048 "$disk" $((ESP_MIB << 10)) >"$work/log" 2>&1 || fail "mkfs.fat failed: $(cat "$work/log")"
esp() {
    local tool=$1
    shift
    MTOOLS_SKIP_CHECK=1 mtools -c "$tool" -i "$disk@@1M" "$@"
}
esp mmd ::/EFI ::/EFI/BOOT ::/loader ::/loader/entries
esp mcopy "$root/usr/lib/systemd/boot/efi/systemd-bootx64.efi" ::/EFI/BOOT/BOOTX64.EFI
esp mcopy "$made/vmlinuz" "$made/initrd.img" ::/
printf 'default debian.conf\ntimeout 0\n' | esp mcopy - ::/loader/loader.conf
esp mcopy - ::/loader/entries/debian.conf <<END
title Debian
linux /vmlinuz
initrd /initrd.img
options root=LABEL=$LABEL ro console=ttyS0 quiet
END

mke2fs -q -F -t ext4 -L "$LABEL" -d "$root" -E "offset=$(((ESP_MIB + 1) << 20))" "$disk" $((size - ESP_MIB - 2))M
mv --no-target-directory "$made" "$out"
