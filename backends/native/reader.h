/* The reader: answers READ requests of a FUSE connection whose pages are all in a pool, below Python.
 *
 *   kernel <-> /dev/fuse <-> reader <-> socket pair <-> libfuse (pyfuse3), unmodified
 *
 * Its parts: `reader_files` (open files and gates), `reader_passing` (requests and replies through the socket, with
 * `reader_flights` for those under way, `reader_amend` for what replies say more, `reader_buffers` for what does not go
 * through it), `reader_shortcut` (requests for Python that do not go there), `reader_nodes` and
 * `reader_lookup` (names), `reader_listings` and `reader_directory` (directories), `reader_hits`, `reader_ahead` (streams of
 * hits), `reader_piped` (large replies) and, for misses that wait for the lower, `reader_waiting`; `reader` itself is who serves, and `reader_life` the rest.
 *
 * A hit takes three system calls: poll, read, writev; two where the next request comes soon (`reader_eager`), or where hits
 * follow each other and a thread waits for all else meanwhile (`reader_sentry`). Most other requests go on through the socket, and libfuse's
 * replies come back the same way; a reply to OPEN or OPENDIR is amended with what libfuse cannot ask for.
 *
 * Who reads: the thread that runs the event loop, in reader_serve, so that a request for Python needs no other
 * thread. When more than one request waits, it wakes helpers, which serve hits beside it and pass the rest on to it;
 * they go to sleep when nothing came for a while. Requests may be answered in any order, as FUSE allows. If the event
 * loop's thread stays away (a handler of its own waits for the lower), a stand-in reads instead: hits go on, and requests
 * of programs that were killed are given up (`reader_interrupt`).
 *
 * Or requests come over io_uring, by a thread for each CPU (`reader_rings`), which does the same with them; what is left to
 * the device, and replies, stay with the threads above. A hit then takes one system call.
 *
 * A READ is answered here only while the file's gate is open: who changes a file's pages, size or object closes it
 * before, and opens it after. What is in the pool is right at any time (pages are flushed before a change is
 * acknowledged); the gate is about what is not: the size, and which object. */
#ifndef READER_H
#define READER_H

#include "reader_buffers.h"
#include "tm.h"

/* Where the pages of one file are; shared by all its open files. */
struct gate;
struct gate *gate_new(void);
/* Returns when no put of what was read before is under way, and none will begin. `takes`: what is missed while it is open
 * may be read and put without Python. */
void gate_set(struct gate *g, const uint8_t *oid, uint64_t size, bool open, bool takes);
void gate_overtake(struct gate *g); /* the same, and changes nothing else */
uint32_t gate_top(struct gate *g);  /* no page from this one on was ever put without Python */
/* Its pages are valid for this state of the file: an OPEN that sees it may be answered without Python. Holds until anything is
 * said to the gate. */
struct stamps {
    int64_t mtime_ns, ctime_ns;
    uint64_t size;
    bool quiet; /* nobody had it open for writing then */
};
void gate_trust(struct gate *g, const struct stamps *s);
void gate_hold(struct gate *g);
void gate_drop(struct gate *g);

struct reader_counters {
    uint64_t hit_reads, hit_pages, hit_bytes; /* answered from the pool alone; pages: by misses, too */
    uint64_t ahead_reads;                     /* of those: with what was fetched before it was asked for */
    uint64_t miss_reads, miss_pages;          /* answered with the lower file's cached pages */
    uint64_t lower_ns, put_ns, put_pages, refused_pages, overtaken_pages;
    uint64_t forwarded;                       /* requests for libfuse */
    uint64_t given_up;                        /* requests of programs that were killed, answered before libfuse did */
    uint64_t attributes, ends;                /* GETATTRs, and ends of listings, answered */
    uint64_t lookups;                         /* LOOKUPs answered by the event loop's thread as it read them */
    uint64_t woken;                           /* times that a helper was woken */
    uint64_t read_sleeps;                     /* times that it began to sleep in read instead of poll */
    uint64_t found_awake;                     /* requests that were looked for, and came, before anybody slept */
    uint64_t opens, closes;                   /* OPENs and RELEASEs answered */
};

enum reader_event { READER_NOTHING, READER_REQUEST, READER_GONE, READER_ASKED };
enum { READER_NEWS = 4 }; /* added to these if there is something to learn (reader_opens.h) */

struct reader;
/* `device` is /dev/fuse (made non-blocking; it blocks at times within reader_serve), `ours` one end of a SOCK_SEQPACKET pair, `theirs` the other, which
 * libfuse reads and writes; all stay the caller's. `largest` is the most bytes of a request or a reply. The stand-in
 * reads when nobody has been in reader_serve for `away_ms`; 0: there is none. A lower that usually answers within
 * `quick_us` is waited for in reader_serve. NULL: errno. */
struct reader *reader_new(int device, int ours, int theirs, unsigned helpers, size_t largest, unsigned away_ms,
                          unsigned quick_us);
/* Take requests by these rings, which are the reader's from now on, as soon as the reply to INIT has asked for them; at most
 * once. -1: errno; requests then come by the device. */
struct rings;
int reader_use_rings(struct reader *r, struct rings *rings);
/* Whoever calls reader_serve tells gates of changes underneath as they are reported. While that thread stays away local files are
 * asked themselves, as `gate_trust` says what they were, before a READ of theirs is answered. */
void reader_watched(struct reader *r);
/* No thread may be in reader_serve. Ends the helpers. */
void reader_free(struct reader *r);
/* Serve until a request for libfuse lies in the socket (READER_REQUEST), there is one that takes the short way
 * (READER_ASKED), the connection is over (READER_GONE), or
 * `timeout_ms` (-1: none) passed, `wake` became readable (-1: none), or a signal came (READER_NOTHING). */
unsigned reader_serve(struct reader *r, int wake, int timeout_ms); /* an event, and perhaps READER_NEWS */
/* Pass libfuse's replies on to the kernel, and return; reader_serve does it too. */
void reader_drain(struct reader *r);
/* Leave the device alone from now on (or not any more). */
void reader_pause(struct reader *r, bool paused);
/* Whether no helper has a request in hand, none waits for libfuse, and none of its replies for the kernel. */
bool reader_quiet(struct reader *r);
/* Whether the device is left alone until libfuse has answered more: only the socket has events then. */
bool reader_full(const struct reader *r);
/* Where requests lie that Python answers itself; none before `shortcut_open`. */
struct shortcut;
struct shortcut *reader_shortcut(struct reader *r);
/* The oldest that was not given up before anybody began with it; the caller frees it. NULL: none. By the thread that calls
 * reader_serve, as the next. */
struct asked *reader_asked(struct reader *r);
/* Answer one of these (`passing_reply`). */
bool reader_reply(struct reader *r, uint64_t unique, int error, const void *bytes, size_t length);
/* Have names looked at and `asked` asked once more (`onlookers_start`). */
bool reader_fetch(struct reader *r, int directory, const char *const *names, unsigned n, struct asked *asked);
/* Have a thread open the file that is open (O_PATH) at `node`, and `asked` asked once more with what comes of it; then it is begun, and
 * has to be answered though it was given up. False: as `onlookers_start`. */
bool reader_open_in_thread(struct reader *r, int node, int flags, struct asked *asked);
/* Answer a LOOKUP of this number, by the thread that calls reader_serve. Unless it `may_wait`, only if the kernel has the name at
 * hand or the lower is quick (`look_up_name`). False: it is not answered, for that or because there are no nodes. */
bool reader_look_up(struct reader *r, uint64_t unique, uint64_t parent, const char *name, bool may_wait);
/* Take in a FORGET, by the same thread; false: it is for Python. */
bool reader_take_back(struct reader *r, uint64_t nodeid, uint64_t count);
/* A buffer of at least so many bytes, one reference; NULL: no memory. */
struct buffer *reader_take(struct reader *r, size_t least);
/* Have the READ that libfuse replies to with the 8 bytes of this number answered from `b`; 0: it is used already. */
uint64_t reader_send(struct reader *r, struct buffer *b, size_t start, size_t length, int error);
/* What the WRITE brings that libfuse was given with the 8 bytes of this number as its data; with a reference. NULL: there
 * is no such request. */
struct buffer *reader_payload(struct reader *r, uint64_t number, size_t *start, size_t *length);
struct nodes;
/* What is known of files beyond their pages; once, for as long as the reader lives. `answers`: GETATTRs are answered from
 * it, else it is only asked for lifetimes. */
void reader_set_nodes(struct reader *r, struct nodes *nodes, bool answers);
/* Answer OPENs as these allow; once. By the thread that calls reader_serve. */
struct opens;
void reader_set_opens(struct reader *r, struct opens *opens);
/* Where open directories are: their requests are answered from it (`reader_directory.c`); once. Nodes must be set. By the same. */
struct listings;
void reader_set_listings(struct reader *r, struct listings *listings);
/* Have the READDIRPLUS of this number, which libfuse has got, answered from the listing `fh`, however long the lower takes,
 * once libfuse has replied with nothing. An errno, or 0. */
int reader_list(struct reader *r, uint64_t number, uint64_t fh);
/* The pool that hits come from; NULL: none. Returns when no thread uses the one before. */
void reader_set_pool(struct reader *r, const struct tm_handle *pool);
/* A file was opened: its handle, and a descriptor, which stays the caller's until reader_close. `local`: to ask for its
 * size takes no waiting. */
int reader_open(struct reader *r, uint64_t fh, int fd, struct gate *gate, bool local); /* -1: no memory */
/* Whether the descriptor is the reader's from now on, which has not done with it. */
bool reader_close(struct reader *r, uint64_t fh);
/* A stream begins with a reader that comes to byte `at` next: its misses are for libfuse, which reads ahead. UINT64_MAX: it is
 * over. What else is read in the file, by whomever, is no matter of it. */
void reader_stream(struct reader *r, uint64_t fh, uint64_t at);
/* It is read ahead of to byte `end`. The READ by which its reader gets beyond `offset` is for libfuse, once. UINT64_MAX: none. */
void reader_mark(struct reader *r, uint64_t fh, uint64_t offset, uint64_t end);
/* Up to where it has come; UINT64_MAX: there is none. */
uint64_t reader_position(struct reader *r, uint64_t fh);
/* The next READ that hits is for libfuse, unless one has missed before. */
void reader_note(struct reader *r, uint64_t fh);
/* Whether one of the last misses of the file ended at `offset`, wherever it was answered. */
bool reader_follows(struct reader *r, uint64_t fh, uint64_t offset);
/* Amend the reply to the OPEN or CREATE that gives out this handle: passthrough to the backing file. To be called before
 * the reply. -1: no memory. */
int reader_pass_through(struct reader *r, uint64_t fh, int32_t backing_id);
void reader_counters(struct reader *r, struct reader_counters *out);

#endif
