/* Robust, process-shared mutexes: the only file that calls pthread_mutex_*.
 *
 * When a holder dies, the next taker gets EOWNERDEAD and repairs what the mutex guards before lock_drop makes it
 * consistent. Every repair derives its result and adjusts nothing, so a repairer that dies too is followed by
 * another, who starts again. lock_drop is the only way to unlock: a robust mutex that is unlocked while
 * inconsistent is useless for ever. */

#include "tm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void lock_init(struct tm_lock *lock)
{
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(&lock->mutex, &attr);
    pthread_mutexattr_destroy(&attr);
}

bool lock_take(struct tm_lock *lock)
{
    int rc = pthread_mutex_lock(&lock->mutex);
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
