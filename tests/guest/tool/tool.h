/* The tool that runs inside guests: one static program with subcommands. It must go on working while memory is
 * exhausted, so it allocates what it needs before, locks it, and does not fork where it could wait. */
#ifndef TOOL_H
#define TOOL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PAGE = 4096 };

/* Subcommands: `argv[0]` is the subcommand's name, as getopt() wants it; the exit status. */
int init_main(void);
int agent_main(int nursery);
int hog_main(int argc, char **argv);
int churn_main(int argc, char **argv);
int beat_main(int argc, char **argv);
int strike_main(int argc, char **argv);
int reader_main(int argc, char **argv);
int keep_main(int argc, char **argv);

/* Print a message with errno's text and end the process. */
_Noreturn void die(const char *what);

double seconds_now(void);
uint64_t mix(uint64_t x);

/* "384M" in bytes; ends the process if it is no size. */
size_t parse_size(const char *text);

/* Write `text` into a file of /proc or /sys; errors are ignored, for what is missing cannot be had. */
void put_text(const char *path, const char *text);

/* Enter a control group. Before anything is allocated: memory stays charged where it was touched first. */
void enter_group(const char *directory);

/* Lock all memory, run in the realtime class (children do not), and be nothing that the OOM killer takes. */
void become_unswappable(void);

/* Progress of the hogs, in memory that the watchdog shares with them. */
enum { HOGS = 16 };
struct progress {
    struct {
        int32_t pid;      /* 0: free */
        uint32_t unused;  /* keeps the counter aligned */
        uint64_t pages;   /* pages written or verified until now */
    } hog[HOGS];
};
struct progress *map_progress(void);

#endif
