/* Robust, process-shared mutexes: the only file that calls pthread_mutex_*.
 *
 * When a holder dies, the next taker gets EOWNERDEAD and repairs what the mutex guards before lock_drop makes it
 * consistent. Every repair derives its result and adjusts nothing, so a repairer that dies too is followed by
 * another, who starts again. lock_drop is the only way to unlock: a robust mutex that is unlocked while
 * inconsistent is useless for ever.
 *
 * A holder may also be stopped (SIGSTOP, Ctrl-Z) between two of its few instructions here, and would keep everybody
 * waiting, a kernel that swaps among them. So whoever has waited for long looks at the holder and continues it. */

#include "tm.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { PATIENCE_MS = 50, TID_MASK = 0x3fffffff };

void lock_init(struct tm_lock *lock)
{
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&lock->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
}

/* The state letter of a thread in /proc, 0 if it is gone (or of another pid namespace). */
static char state_of(int tid)
{
    char path[32], text[512];
    snprintf(path, sizeof path, "/proc/%d/stat", tid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    text[n > 0 ? n : 0] = 0;
    const char *end = strrchr(text, ')'); /* the name before it may contain anything */
    return end && end[1] == ' ' ? end[2] : 0;
}

void continue_if_stopped(int tid)
{
    if (tid && state_of(tid) == 'T')
        kill(tid, SIGCONT);
}

/* We have waited for the lock longer than any holder that runs keeps it: continue the holder if it is stopped. */
static void continue_holder(struct tm_lock *lock)
{
    continue_if_stopped(__atomic_load_n(&lock->mutex.__data.__lock, __ATOMIC_RELAXED) & TID_MASK);
}

static int take_slowly(struct tm_lock *lock)
{
    for (;;) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += PATIENCE_MS * 1000000;
        until.tv_sec += until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        int rc = pthread_mutex_clocklock(&lock->mutex, CLOCK_MONOTONIC, &until);
        if (rc != ETIMEDOUT)
            return rc;
        continue_holder(lock);
    }
}

bool lock_take(struct tm_lock *lock)
{
    int rc = pthread_mutex_trylock(&lock->mutex);
    if (rc == EBUSY)
        rc = take_slowly(lock);
    if (rc == 0)
        return false;
    if (rc != EOWNERDEAD) /* a damaged segment: going on would damage pages */
        abort();
    return true; /* consistent only in lock_drop: a repairer that dies leaves EOWNERDEAD to the next */
}

void lock_drop(struct tm_lock *lock)
{
    /* Harmless (EINVAL) on a mutex that is consistent; needed on one that was taken over and repaired. */
    pthread_mutex_consistent(&lock->mutex);
    pthread_mutex_unlock(&lock->mutex);
}

int lock_try_life(struct tm_lock *lock)
{
    switch (pthread_mutex_trylock(&lock->mutex)) {
    case 0:
        return LIFE_FREE;
    case EOWNERDEAD:
        return LIFE_DEAD;
    default:
        return LIFE_TAKEN;
    }
}
