#!/bin/busybox sh
# The guest's first process: loads the modules, mounts the root, sets up what every system has, and becomes the
# nursery of the tool. Parameters on the kernel's command line: guest.name=NAME guest.root=DEVICE.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
while read -r module parameters; do
    # shellcheck disable=SC2086 # several parameters are several words
    $b insmod "/modules/$module.ko" $parameters || echo "guest: module $module does not load"
done </modules/list
name=guest root=/dev/vda
for word in $($b cat /proc/cmdline); do
    case $word in
    guest.name=*) name=${word#*=} ;;
    guest.root=*) root=${word#*=} ;;
    esac
done
$b mount -t ext4 -o rw,noatime "$root" /root || exec $b sh
for directory in proc sys dev; do
    $b mount --move /$directory /root/$directory
done
cd /root || exit 1
$b mkdir -p dev/shm dev/pts
$b mount -t tmpfs -o mode=1777 shm dev/shm
$b mount -t devpts pts dev/pts
$b mount -t tmpfs -o mode=0755 run run
$b mount -t tmpfs -o mode=1777 tmp tmp
if $b mount -t cgroup2 cgroup sys/fs/cgroup; then
    for controller in memory cpu io pids; do
        echo +$controller >sys/fs/cgroup/cgroup.subtree_control
    done
fi
$b hostname "$name"
$b ip link set lo up
if $b ip link set eth0 up 2>/dev/null; then
    $b ip address add 10.0.2.15/24 dev eth0
    $b ip route add default via 10.0.2.2
fi
echo 1 >proc/sys/kernel/sysrq
echo 8 >proc/sys/kernel/printk # what the kernel has to say from now on belongs on the console
exec $b switch_root /root /usr/lib/guest/tool init
