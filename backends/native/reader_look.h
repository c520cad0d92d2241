/* Looking names of the lower up, and who may wait for that.
 *
 * A slow lower takes milliseconds for a name that the kernel does not have at hand, and programs that look at names side by side
 * would wait for the event loop's thread one after the other. So that thread looks up what is at hand, and has the rest fetched
 * first (`reader_onlookers.h`), unless the lower usually answers about as fast as threads are switched. As with READs
 * (`reader_waiting.h`) the first answer that takes much longer ends that, until many quick ones have followed. For any thread. */
#ifndef READER_LOOK_H
#define READER_LOOK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

/* How long a lower takes for what is not at hand: names here, READs in `reader_waiting.h`. */
struct patience {
    _Atomic int64_t usual_ns;  /* the mean, of which the last is an eighth */
    _Atomic int64_t missed_ns; /* when there was one last, monotonic */
};

void patience_init(struct patience *p);
void patience_note(struct patience *p, int64_t took_ns);
bool patience_is_below(const struct patience *p, int64_t ns); /* it usually takes less */
/* Whether who must not wait for long may all the same. */
bool patience_is_quick(const struct patience *p);
/* Whether a name was not at hand within the last second: then a directory's content, of which that cannot be told, is not
 * likely to be. */
bool patience_missed_lately(struct patience *p);

/* Whether the kernel has a name at hand; false as well where it does not tell. */
bool look_is_at_hand(int directory, const char *name);
/* `fd`, and what stat says of it; -1: errno, and it is closed, if it was open at all. */
int look_at_open(int fd, struct stat *st);
/* Open the file that `fd` has open, maybe O_PATH, once more, as `flags` say. -1: errno. */
int open_again(int fd, int flags);
/* An O_PATH descriptor of what has this name, and what stat says of it; -1: errno. EAGAIN: the lower would have to be asked, and
 * the caller may not wait for it. */
int look_up_name(struct patience *p, int directory, const char *name, bool may_wait, struct stat *st);

#endif
