#include "reader_look.h"

#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#define QUICK_NS INT64_C(100000)
#define UNKNOWN_NS INT64_C(1000000000) /* before the first: some seventy quick ones must come */
#define LATELY_NS INT64_C(1000000000)
enum { FADING = 8, FLAGS = O_PATH | O_NOFOLLOW | O_CLOEXEC };

void patience_init(struct patience *p)
{
    atomic_init(&p->usual_ns, UNKNOWN_NS);
    atomic_init(&p->missed_ns, INT64_MIN / 2);
}

void patience_note(struct patience *p, int64_t took_ns)
{
    int64_t usual_ns = atomic_load_explicit(&p->usual_ns, memory_order_relaxed);
    /* Of two at a time one may be lost; it is a guess. */
    atomic_store_explicit(&p->usual_ns, usual_ns + (took_ns - usual_ns) / FADING, memory_order_relaxed);
}

bool patience_is_below(const struct patience *p, int64_t ns)
{
    return atomic_load_explicit(&p->usual_ns, memory_order_relaxed) < ns;
}

bool patience_is_quick(const struct patience *p) { return patience_is_below(p, QUICK_NS); }

bool patience_missed_lately(struct patience *p)
{
    return (int64_t)timing_now() - atomic_load_explicit(&p->missed_ns, memory_order_relaxed) < LATELY_NS;
}

/* What the kernel has at hand; else EAGAIN, or -1 and ENOSYS where it does not tell (before 5.12, and in some containers). */
static int open_at_hand(int directory, const char *name)
{
    static _Atomic bool untold;
    struct open_how how = {.flags = FLAGS, .resolve = RESOLVE_CACHED};
    if (!atomic_load_explicit(&untold, memory_order_relaxed)) {
        int fd = (int)syscall(SYS_openat2, directory, name, &how, sizeof how);
        if (fd >= 0 || (errno != EINVAL && errno != ENOSYS && errno != EPERM))
            return fd;
        atomic_store_explicit(&untold, true, memory_order_relaxed);
    }
    errno = ENOSYS;
    return -1;
}

bool look_is_at_hand(int directory, const char *name)
{
    int fd = open_at_hand(directory, name);
    if (fd >= 0)
        close(fd);
    return fd >= 0 || (errno != EAGAIN && errno != ENOSYS);
}

static int open_path(struct patience *p, int directory, const char *name, bool may_wait)
{
    int fd = open_at_hand(directory, name);
    if (fd >= 0 || (errno != EAGAIN && errno != ENOSYS))
        return fd;
    int64_t begun_ns = (int64_t)timing_now();
    if (errno == EAGAIN) {
        atomic_store_explicit(&p->missed_ns, begun_ns, memory_order_relaxed);
        if (!may_wait && !patience_is_quick(p))
            return -1;
    }
    fd = openat(directory, name, FLAGS);
    patience_note(p, (int64_t)timing_now() - begun_ns);
    return fd;
}

int look_at_open(int fd, struct stat *st)
{
    if (fd < 0 || !fstat(fd, st))
        return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int open_again(int fd, int flags)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, flags | O_CLOEXEC);
}

int look_up_name(struct patience *p, int directory, const char *name, bool may_wait, struct stat *st)
{
    int fd;
    do
        fd = open_path(p, directory, name, may_wait);
    while (fd < 0 && errno == EINTR);
    return look_at_open(fd, st);
}
