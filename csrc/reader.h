// The threads that read records from disk.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "busy_clock.h"
#include "record.h"

namespace moert {

// Why a record is read. All of a class goes before any of the next one.
enum class ReadClass : int { kDemand, kPromotion, kPrefetch };
constexpr int kReadClasses = 3;

constexpr int kMaxLanes = 256;

struct Record;

// This is a fork of the process that made the reader, the reader is closed, or the system gives no thread.
class ReaderError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// How many chunks of one disk are read at once, and how many of them may be no demand: a demand that comes now waits
// for what is in flight, so guesses never fill all the lanes.
struct Lanes {
    int all = 0, guesses = 0;
};

// What a disk did while all its lanes were busy.
struct Saturation {
    uint64_t device;
    int lanes;
    double nbytes, seconds;
};

// What is to be done with a record once all of it is there, before it is settled. Does not throw.
using AfterRead = std::function<void()>;

// The chunks of a record that are on one disk. They are the same for parts that differ in their destinations only.
struct Share {
    uint64_t device;
    std::shared_ptr<const std::vector<Chunk>> chunks;
    size_t begun = 0;
};

std::vector<Share> share_out(const std::vector<Part>& parts);

// A record to be read. `shares` are those of its parts, for whoever knows them. `nbytes` are those that somebody wants,
// without what is read around them.
struct Wanted {
    std::vector<Part> parts;
    std::vector<Share> shares;
    uint64_t nbytes = 0;
    AfterRead after;
};

// Reads records in chunks, in the order of their classes and within a class of their submission, so that of many the
// first is there first. Each disk has its own lanes, a thread each; threads start as they are needed.
//
// May be called from any thread. In a fork of its process a reader refuses, and is not to be destroyed.
class Reader {
  public:
    Reader(Lanes lanes, std::shared_ptr<BusyClock> clock, ReadCall call = pread);
    ~Reader();

    // Returns at once. Until a record is settled its files stay open and its memory belongs to the reader. All of them
    // are queued, in order, or none: throws ReaderError.
    std::vector<std::shared_ptr<Record>> submit(std::vector<Wanted> wanted, ReadClass kind);
    std::shared_ptr<Record> submit(std::vector<Part> parts, uint64_t record_bytes, ReadClass kind,
                                   AfterRead after = {});

    // Settles a record of which nothing has been begun; false, and no change, for others.
    bool cancel(const std::shared_ptr<Record>& record);

    // Begins no more of a record that nobody demands: once what has been begun has ended, it is settled as cancelled.
    // False, and no change, where all of it has been begun.
    bool give_up(const std::shared_ptr<Record>& record);

    // What is still to be begun of the record goes behind what is of a higher class; false where that is nothing, or
    // not of a lower class. One that was given up is taken up again, in that class.
    bool promote(const std::shared_ptr<Record>& record, ReadClass kind = ReadClass::kDemand);

    // For one disk, from now on. What is in flight beyond them ends.
    void set_lanes(uint64_t device, Lanes lanes);

    // Of each disk that has been saturated for `seconds` and has read `nbytes` in that time, since the last asking or
    // since its lanes have changed.
    std::vector<Saturation> saturation(double seconds, double nbytes);

    bool in_fork() const { return getpid() != pid_; }
    uint64_t records() const { return records_.load(); }
    uint64_t bytes_read() const { return bytes_read_.load(); }

    // Settles what has not been begun. The threads end once they have read the rest; `close` waits for them.
    void shut_down();
    void close();

  private:
    struct Queued {
        std::shared_ptr<Record> record;
        size_t share;
    };

    struct Disk {
        uint64_t device = 0;
        Lanes lanes;
        int busy = 0, guessing = 0, idle = 0, ending = 0;
        size_t demands = 0, guesses = 0;  // chunks in the queues
        std::array<std::deque<Queued>, kReadClasses> queues;
        std::condition_variable changed;
        std::vector<std::thread> threads;

        double saturated_s = 0, counted_from_s = 0, saturated_bytes = 0;
        std::chrono::steady_clock::time_point saturated_since;
    };

    struct Taken {
        std::shared_ptr<Record> record;
        const Chunk* chunk;
        bool guess;
        double saturated_s;
        std::chrono::steady_clock::time_point began;
    };

    void refuse_fork() const;
    Disk& disk_of(uint64_t device);
    static size_t& waiting(Disk& disk, ReadClass kind) {
        return kind == ReadClass::kDemand ? disk.demands : disk.guesses;
    }
    void push(const std::shared_ptr<Record>& record, size_t share);
    static size_t beginnable(const Disk& disk);
    size_t sleepers(Disk& disk);
    static void wake(Disk& disk, size_t count);
    bool start_thread(Disk& disk);
    void work(Disk& disk);
    bool take(Disk& disk, Taken* taken);
    void put_back(Disk& disk, const Taken& taken);
    void enter(Disk& disk, int change, std::chrono::steady_clock::time_point now);
    size_t withdraw(Record& record);
    void end_record(Record& record);

    const pid_t pid_ = getpid();
    const ReadCall call_;
    const Lanes lanes_;
    const std::shared_ptr<BusyClock> clock_;
    std::atomic<uint64_t> records_{0}, bytes_read_{0};

    std::mutex joining_;
    std::mutex mutex_;  // guards all below, and what records say it does
    std::map<uint64_t, Disk> disks_;
    bool closing_ = false;
};

struct Record {
    std::vector<Part> parts;
    uint64_t nbytes = 0;
    std::vector<Share> shares;
    AfterRead after;
    Outcome outcome;

    // Of the chunks that have been begun. Only once the outcome is settled.
    uint64_t nbytes_begun() const;

    // All below, and the number of chunks begun, are guarded by the reader's mutex until the outcome is settled.
    ReadClass kind = ReadClass::kDemand;
    size_t unfinished = 0;
    bool begun = false, failed = false, given_up = false;
    Failure failure{};
    std::chrono::steady_clock::time_point began;
    double seconds = 0;  // from the start of the first chunk to the end of the last
};

}  // namespace moert
