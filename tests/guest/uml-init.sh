#!/bin/sh
# The first process of a user-mode-linux guest, whose root is the host's, read-only: as init.sh, on top of that.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts pts /dev/pts
tool='' name=guest modules='' path=''
for word in $(cat /proc/cmdline); do
    case $word in
    guest.tool=*) tool=${word#*=} ;;
    guest.name=*) name=${word#*=} ;;
    guest.modules=*) modules=${word#*=} ;;
    guest.path=*) path=${word#*=} ;;
    esac
done
insmod "$modules/kernel/drivers/block/nbd.ko" nbds_max=4
mount -t tmpfs -o mode=0755 run /run
mkdir /run/guest
cp "$tool" /run/guest/guest-tool
mount -t tmpfs -o mode=1777 tmp /var/tmp
busybox hostname "$name"
busybox ip link set lo up
echo 1 >/proc/sys/kernel/sysrq
echo 8 >/proc/sys/kernel/printk
GUEST_PORT=/dev/ttyS0 GUEST_PATH=$path:/run/guest exec /run/guest/guest-tool init
